# The demo's tagger: 16 tags of synthetic clips, 96 training clips.
data = "data/demo_clips"
task = "tags"
sources = ["vocals", "other", "drums", "bass"]  # as config/demo_sep.py, without --init
pool = "avg"
widths = [4, 16, 16, 32, 32, 32]
tail_widths = [16, 16, 32, 32, 32, 32, 64]
bn_momentum = 0.1
recipe = "modern"
learning_rate = 2e-3  # lower for a trained U-Net: --unet_lr=0.1 with --init
batch_size = 8
chunk = 0             # all clips in every epoch
epochs = 8            # x 12 batches of 8
