# The demo: one separator, three networks, three seeds, on synthetic music. First:
#     python prepare_data.py demo
# Then:
#     python table.py config/table_demo.py
separators = {"separator": "config/demo_sep.py"}
tasks = {"tags": "config/demo_tags.py"}
rows = {    # a short run comes last, so that no core idles for long
    "pretrained": "--init={separator} --unet_lr=0.1",
    "scratch": "config/scratch.py",
    "tail": "config/tail.py",
}
seeds = [1, 2, 3]
jobs = 2    # of one thread each on two cores
