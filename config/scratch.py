# The whole network from random weights ("TUne+"): name it after a task, as in `config/mtat.py config/scratch.py`.
init = ""
