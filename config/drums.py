# A drums separator as in the paper: config/vocals.py with another source and learning rate.
data = "data/musdb"
sources = ["drums"]
learning_rate = 2e-4  # x 0.9 every 15,000 steps: 2.4e-5 at the end
