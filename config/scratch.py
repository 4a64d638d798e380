# The whole network from random weights ("TUne+").
# Name it behind a task: config/mtat.py config/scratch.py
init = ""
