"""Datasets to the prepared format of data.py. A dataset is one file here; prepare_data.py runs it.

`python prepare_data.py NAME` takes NAME.py. Such a file has a function `listing` that returns a
store.Listing: who is in which split, with which labels, and in which file. Its lower-case
assignments are settings of the command line. `downloads` says where the data comes from.
"""
