"""What a newcomer sees: the demo's only warnings are ones to act on, benches end in a table."""

import importlib.util
import sys

import nbformat
import pytest
import run as run_demo  # demo/run.py
import torch
from conftest import ROOT  # puts demo/ on the path


def notebook(*sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def test_a_kernel_of_the_demo_says_nothing_of_its_own(tmp_path, monkeypatch, capfd):
    """Prints and errors of cells arrive; how kernel and papermill talk to each other does not."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(run_demo, "ROOT", tmp_path)
    monkeypatch.setattr(run_demo, "OUTPUT", tmp_path / "out")
    setting = (
        "from IPython import get_ipython\nif shell := get_ipython():\n"
        '    shell.InteractiveTB.set_mode("Minimal")'
    )
    nbformat.write(notebook(setting, "print('a result')"), tmp_path / "notebooks" / "a.ipynb")
    run_demo.run_notebook("a", {})
    out, err = capfd.readouterr()
    said = [line for line in (out + err).splitlines() if line.strip()]
    assert said == ["== notebooks/a.ipynb", "a result"]
    failing = notebook(setting, "def f():\n    raise ValueError('one line')", "f()")
    nbformat.write(failing, tmp_path / "notebooks" / "b.ipynb")
    with pytest.raises(SystemExit, match="ValueError: one line"):
        run_demo.run_notebook("b", {})
    outputs = nbformat.read(tmp_path / "out" / "b.ipynb", 4).cells[-1].outputs
    assert [len(output.traceback) for output in outputs] == [1]


def test_no_notebook_prints_its_mode_of_exceptions():
    for path in (ROOT / "notebooks").glob("*.py"):
        text = path.read_text()
        assert "%xmode Minimal" not in text and 'InteractiveTB.set_mode("Minimal")' in text


def test_a_bench_s_configuration_that_does_not_fit_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    spec = importlib.util.spec_from_file_location("bench_training", ROOT / "bench" / "training.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)

    def too_large():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a ..."
        )

    assert bench.fits("B64", too_large) is None and bench.fits("B8", lambda: (1.0, 2.0)) == (
        1.0,
        2.0,
    )
    (line,) = bench.rows_of_table
    assert line[0].strip() == "B64"
    assert line[1] == "does not fit: CUDA out of memory. Tried to allocate 9.00 GiB"
    assert capsys.readouterr().out.count("\n") == 1
    # every configuration goes that way, the profile of the last one that fits too
    source = (ROOT / "bench" / "training.py").read_text()
    called = [line for line in source.splitlines() if "timed_steps" in line and "def " not in line]
    assert len(called) == 3 and all("fits(" in line for line in called)
    assert 'fits("profile"' in source and 'fits("stock"' in source
