# The tail alone, on the mel spectrogram.
# Name it behind a task: config/mtat.py config/tail.py
variant = "tail"
