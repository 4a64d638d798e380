# A separator of other as in the paper: config/vocals.py with another source and learning rate.
data = "data/musdb"
sources = ["other"]
learning_rate = 3e-4  # x 0.9 every 15,000 steps: 3.6e-5 at the end
