# Does pre-training help on your own clips, and with how few labels? First:
#     python prepare_data.py folder --csv=FILE --name=mine
# Then, with the authors' separators:
#     python table.py config/table_own.py
# With a column "fold" in the table of clips: --folds=0,1,2,3
tasks = {"genre": "config/own_genre.py"}
rows = {
    "tail": "--variant=tail",
    "scratch": "",
    "vocals": "--init=released:vocals",
    "multisource": "--init=released:multisource",
}
labels = {1.0: "", 0.25: "--epochs=100", 0.1: "--epochs=200"}
seeds = [1, 2, 3]
