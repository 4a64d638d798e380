# Tagging MagnaTagATune as in the paper. With --init=ckpt/vocals.pt it starts from a separator.
data = "data/mtat"
task = "tags"
chunk = 1024  # 15,244 clips: an epoch is 14 whole chunks = 14,336 clips = 896 steps of 16
