# One separator of all four sources as in the paper.
# Masks in the authors' order; their four-source separator uses average pooling.
data = "data/musdb"
sources = ["vocals", "other", "drums", "bass"]
pool = "avg"
learning_rate = 3e-4  # x 0.9 every 15,000 steps: 3.6e-5 at the end
