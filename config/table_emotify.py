# Real music: the 320 clips of the Emotify study, 4 genres and 9 emotions, artists in four folds,
# and separators of a handful of songs. First, with the stems in SONGS and the clips in CLIPS:
#     python prepare_data.py stems --path=SONGS --name=songs
#     python prepare_data.py folder --csv=CLIPS/clips.csv --name=emotify_genre
#     python prepare_data.py folder --csv=CLIPS/clips.csv --label=emotions --separator="|" \
#         --name=emotify_tags
# Then:
#     python table.py config/table_emotify.py

# the U-Net is narrow where spectrograms are large; the tail has half the paper's widths
_songs = ("config/demo_sep.py --data=data/songs --widths=4,8,16,32,32,32 "
          "--steps=600 --lr_decay_every=60 --dtype=bfloat16")
_clips = ("--sources=vocals --pool=max --widths=4,8,16,32,32,32 "
          "--tail_widths=16,32,64,64,64,64,128 --dropout=0.2 "
          "--epochs=16 --learning_rate=4e-3 --val_crops=1 --dtype=bfloat16")
separators = {
    "vocals": f"{_songs} --sources=vocals --pool=max",
    "drums": f"{_songs} --sources=drums --pool=max",
    "three": f"{_songs} --sources=vocals,other,drums",    # bass is silent in most of these songs
}
tasks = {
    "tags": f"config/demo_tags.py --data=data/emotify_tags {_clips}",
    "genre": f"config/demo_genre.py --data=data/emotify_genre {_clips}",
}
rows = {
    "tail": "--variant=tail",
    "scratch": "",
    "vocals": "--init={vocals} --unet_lr=0.1",
    "three": "--init={three} --unet_lr=0.1",
    # both halves are trained already: half the epochs, or a third with a quarter of the labels
    "joined": "--variant=v3 --init={three} --tail={tail} --unet_lr=0.1 --epochs=8",
}
labels = {1.0: "", 0.25: "--epochs=24"}
folds = [0, 1, 2, 3]
seeds = [1, 2]
jobs = 2    # of one thread each on two cores
test_dtype = "bfloat16"     # as the runs were trained and validated
