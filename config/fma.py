# Genres of FMA as in the paper. With --init=ckpt/vocals.pt it starts from a separator.
data = "data/fma"
task = "genre"
chunk = 1024  # an epoch is all whole chunks of 1,024 clips, 64 steps of 16 each
