_base_ = "dino-4scale_r50_8xb2-12e_coco.py"

# The head hands it the IoU of each matched box; a box that misses its object stays a positive.
model = dict(bbox_head=dict(loss_cls=dict(_delete_=True, type="detloss_plugins.MALoss", use_sigmoid=True, gamma=1.5)))
