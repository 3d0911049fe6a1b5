"""Tables as a notebook shows them."""

import pandas as pd

from prompt_recovery.plots import whole_texts


def test_texts_are_whole_and_escaped_and_numbers_have_two_decimals():
    long = "word " * 200
    table = pd.DataFrame(
        {"text": [long, "<b>a</b>\nb"], "score": [1.002422e-04, -0.001], "rows": [3, 12]}
    )
    html = whole_texts(table).to_html()
    assert long in html and "&lt;b&gt;a&lt;/b&gt;\nb" in html and "pre-wrap" in html
    assert html.count(">0.00<") == 2 and "-0.00" not in html and ">12<" in html
    assert table["score"][1] == -0.001  # the table itself stays
    whole_texts(table.head(0)).to_html()
