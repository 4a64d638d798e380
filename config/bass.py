# A bass separator as in the paper: config/vocals.py with another source and learning rate.
data = "data/musdb"
sources = ["bass"]
learning_rate = 1e-4  # x 0.9 every 15,000 steps: 1.2e-5 at the end
