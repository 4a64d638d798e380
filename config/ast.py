# A transformer instead of the convolutional tail, with the paper's recipe for it (arXiv v3).
# Combine it with a task: config/mtat.py config/ast.py --vit=ViT-B_16.npz, which is at
# https://storage.googleapis.com/vit_models/imagenet21k+imagenet2012/ViT-B_16.npz
variant = "ast"
recipe = "ast"
batch_size = 4        # crops of 768 frames
learning_rate = 5e-5  # halved after 5 epochs, then after every 2; then SGD at 1e-3
val_crops = 3         # end to end in a clip of 29 s
