"""One file per dataset, and what they share. `python prepare_data.py NAME` runs NAME.py.

listing() returns a store.Listing: items with splits, labels and files. Lower-case assignments are
settings. downloads(), if there is one, returns the folder in OUT/raw/, tables and archives, each
[(URL, checksum)].
"""
