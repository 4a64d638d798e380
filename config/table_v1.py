# The table of the paper's first version: seven rows, two datasets, five seeds. First:
#     python prepare_data.py musdb; python prepare_data.py mtat; python prepare_data.py fma
# Then:
#     python table.py config/table_v1.py
separators = {
    "vocals": "config/vocals.py",
    "bass": "config/bass.py",
    "drums": "config/drums.py",
    "other": "config/other.py",
    "multisource": "config/multisource.py",
}
tasks = {"mtat": "config/mtat.py", "fma": "config/fma.py"}
rows = {
    "tail": "--variant=tail",
    "scratch": "",
    "vocals": "--init={vocals}",
    "bass": "--init={bass}",
    "drums": "--init={drums}",
    "other": "--init={other}",
    "multisource": "--init={multisource}",
}
seeds = [1, 2, 3, 4, 5]
