# The demo's separator: all four sources of the synthetic songs.
# Narrower than the paper's: minutes on a CPU, not days.
data = "data/demo_songs"
sources = ["vocals", "other", "drums", "bass"]
pool = "avg"
widths = [4, 16, 16, 32, 32, 32]
bn_momentum = 0.1  # 0.01 would not settle in so few steps
steps = 300        # x 8 mixes
learning_rate = 3e-3
lr_decay_every = 30
lr_decay = 0.8
val_every = 150
val_mixes = 32
log_every = 25
