"""One file per dataset, run by prepare_data.py, and what they share.

`python prepare_data.py NAME` runs NAME.py. Its function `listing` returns a store.Listing: items
with splits, labels and files. Its lower-case assignments are settings of the command line. An
optional function `downloads` returns the folder in OUT/raw/, and (URL, checksum) of its files.
"""
