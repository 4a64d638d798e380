# The demo: one separator, three rows, three seeds, on synthetic music. First:
#     python prepare_data.py demo
# Then:
#     python table.py config/table_demo.py
separators = {"separator": "config/demo_sep.py"}
tasks = {"tags": "config/demo_tags.py"}
rows = {    # short runs come last, so that no core idles for long
    "pretrained": "--init={separator} --unet_lr=0.1",
    "scratch": "",
    "tail": "--variant=tail",
}
seeds = [1, 2, 3]
jobs = 2    # of one thread each on two cores
