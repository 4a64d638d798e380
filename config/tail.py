# The tail alone, on the mel spectrogram: name it after a task, as in `config/mtat.py config/tail.py`.
variant = "tail"
