# The table of the paper's v3: two trained halves are joined by adapters, with a convolutional tail
# or a transformer. First, besides the datasets of config/table_v1.py:
#     python prepare_data.py gtzan --path=FOLDER
# Then:
#     python table.py config/table_v3.py
# For published transformer weights add --vit=ViT-B_16.npz to the rows with config/ast.py.
separators = {
    "vocals": "config/vocals.py",
    "multisource": "config/multisource.py",
}
tasks = {
    "mtat": "config/mtat.py",
    "fma": "config/fma.py",
    "gtzan": "config/fma.py --data=data/gtzan --chunk=0",
}
rows = {
    "tail": "--variant=tail",
    "scratch": "--variant=v3",
    "vocals": "--variant=v3 --init={vocals} --tail={tail}",
    "multisource": "--variant=v3 --init={multisource} --tail={tail}",
    "vocals_3skips": "--variant=v3 --init={vocals} --tail={tail} --skips=3",
    "vocals_frozen": "--variant=v3 --init={vocals} --tail={tail} --freeze=unet",
    "ast": "config/ast.py --variant=ast_tail",
    "ast_vocals": "config/ast.py --init={vocals} --tail={ast}",
}
seeds = [1, 2, 3, 4, 5]
