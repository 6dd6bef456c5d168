"""mmengine configuration: CMT with VoVNet-99 at 1600 x 640 and voxels of 0.075 m, nuScenes, 8 GPUs with 2 samples each.

Run from this folder, with mmdet3d's info files in ``data_root``:
``python -c "from mmengine import Config; from mmengine.runner import Runner;
Runner.from_cfg(Config.fromfile('mmdet3d_config.py')).train()"``
"""

custom_imports = {"imports": ["mmdet3d_plugin"], "allow_failed_imports": False}
default_scope = "mmdet3d"
work_dir = "runs/mmdet3d"

architecture = "fusion-vov"
size = (640, 1600)
data_root = "data/nuscenes/"
classes = (
    *("car", "truck", "construction_vehicle", "bus", "trailer"),
    *("barrier", "motorcycle", "bicycle", "pedestrian", "traffic_cone"),
)
metainfo = {"classes": classes, "version": "v1.0-trainval"}
cameras = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
modality = {"use_lidar": True, "use_camera": True}
data_prefix = {"pts": "samples/LIDAR_TOP", "sweeps": "sweeps/LIDAR_TOP"} | {name: f"samples/{name}" for name in cameras}
epochs = 20

load = [
    {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": 5, "use_dim": 5},
    {"type": "LoadPointsFromMultiSweeps", "sweeps_num": 10, "use_dim": [0, 1, 2, 3, 4]},
    {"type": "LoadMultiViewImageFromFiles", "to_float32": True, "num_views": 6},
]
train_pipeline = [
    *load,
    {"type": "LoadAnnotations3D", "with_bbox_3d": True, "with_label_3d": True},
    {"type": "CMTSample", "architecture": architecture, "size": size, "training": True, "masked": True},
    {"type": "PointShuffle"},
    {"type": "Pack3DDetInputs", "keys": ["points", "img", "gt_bboxes_3d", "gt_labels_3d"]},
]
test_pipeline = [
    *load,
    {"type": "CMTSample", "architecture": architecture, "size": size},
    {"type": "Pack3DDetInputs", "keys": ["points", "img"]},
]
common = {
    "type": "NuScenesDataset",
    "data_root": data_root,
    "data_prefix": data_prefix,
    "metainfo": metainfo,
    "modality": modality,
    "box_type_3d": "LiDAR",
}
train_dataloader = {
    "batch_size": 2,
    "num_workers": 6,
    "persistent_workers": True,
    "sampler": {"type": "DefaultSampler", "shuffle": True},
    "dataset": {
        "type": "CBGSDataset",
        "dataset": {**common, "ann_file": "nuscenes_infos_train.pkl", "pipeline": train_pipeline},
    },
}
val_dataloader = {
    "batch_size": 1,
    "num_workers": 4,
    "persistent_workers": True,
    "sampler": {"type": "DefaultSampler", "shuffle": False},
    "dataset": {**common, "ann_file": "nuscenes_infos_val.pkl", "pipeline": test_pipeline, "test_mode": True},
}
test_dataloader = val_dataloader
val_evaluator = {
    "type": "NuScenesMetric",
    "data_root": data_root,
    "ann_file": data_root + "nuscenes_infos_val.pkl",
    "metric": "bbox",
    "modality": modality,
}
test_evaluator = val_evaluator

model = {
    "type": "CMTDetector",
    "architecture": architecture,
    "data_preprocessor": {
        "type": "Det3DDataPreprocessor",
        "mean": [103.530, 116.280, 123.675],
        "std": [57.375, 57.120, 58.395],
        "bgr_to_rgb": False,
        "pad_size_divisor": 32,
    },
}
optim_wrapper = {
    "type": "OptimWrapper",
    "optimizer": {"type": "AdamW", "lr": 1e-4, "weight_decay": 0.01},
    "paramwise_cfg": {
        "custom_keys": {"net.image.backbone": {"lr_mult": 0.01, "decay_mult": 5}, "net.image.neck": {"lr_mult": 0.1}}
    },
    "clip_grad": {"max_norm": 35, "norm_type": 2},
}
by_step = {"by_epoch": True, "convert_to_iter_based": True}
rise, fall = {"T_max": 8, "begin": 0, "end": 8, **by_step}, {"T_max": 12, "begin": 8, "end": epochs, **by_step}
param_scheduler = [
    {"type": "CosineAnnealingLR", "eta_min_ratio": 8.0, **rise},
    {"type": "CosineAnnealingLR", "eta_min_ratio": 1e-4, **fall},
    {"type": "CosineAnnealingMomentum", "eta_min": 0.9 * 0.8947368421052632, **rise},
    {"type": "CosineAnnealingMomentum", "eta_min": 0.9, **fall},
]
train_cfg = {"by_epoch": True, "max_epochs": epochs, "val_interval": epochs}
val_cfg = {}
test_cfg = {}
auto_scale_lr = {"enable": False, "base_batch_size": 16}
