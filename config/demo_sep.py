# The demo's separator: all four sources of the synthetic songs.
# It is narrower than the paper's: minutes on a CPU, not days.
data = "data/demo_songs"
sources = ["vocals", "other", "drums", "bass"]
pool = "avg"
widths = [8, 16, 16, 32, 32, 32]
bn_momentum = 0.1  # statistics of 0.99 per step would not settle in so few steps
batch_size = 2     # more and smaller steps learn more from as many mixes
steps = 600
learning_rate = 3e-3
lr_decay_every = 60
lr_decay = 0.8
val_every = 100
val_mixes = 32
log_every = 50
