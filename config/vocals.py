# A vocals separator as in the paper.
# 300,000 steps x 8 mixes x 3.86 s = 2,573 hours of random mixes of 86 songs.
data = "data/musdb"
sources = ["vocals"]
learning_rate = 1e-3  # x 0.9 every 15,000 steps: 1.2e-4 at the end
