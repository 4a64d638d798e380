# Your own clips, one label each. First:
#     python prepare_data.py folder --path=FOLDER --name=mine
# Then, from a separator of pretrain_sep.py or a released one:
#     python finetune_cls.py config/own_genre.py --init=ckpt/vocals.pt
data = "data/mine"    # another name: --data=data/NAME
task = "genre"
recipe = "modern"
learning_rate = 5e-4
batch_size = 16       # lower it if memory runs out, or for fewer clips
chunk = 0             # all clips in every epoch
epochs = 50           # 1,000 clips: 62 steps an epoch
