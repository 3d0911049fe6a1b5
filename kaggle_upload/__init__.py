"""Publish adapter, base, wheels and notebook with the kaggle program: `python -m kaggle_upload
--help`."""
