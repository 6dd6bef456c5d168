"""CMT as a detector of MMDetection3D 1.4, trained and tested by mmengine's Runner (extra ``mmdet3d``).

``mmdet3d_config.py`` is a configuration that imports this file. Loading frames and the metric are MMDetection3D's; what
the paper adds in between (masked modalities, augmentation with calibration) is this folder's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet3d.models.detectors import Base3DDetector
from mmdet3d.registry import MODELS, TRANSFORMS
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.structures import InstanceData
from torch import Tensor

from backbones import branches
from data import JITTER, Sample, draw_transform, keep_in_range, resize_crop_flip, transform
from model import (
    ARCHITECTURES,
    CMT,
    Architecture,
    Batch,
    Detections,
    Targets,
    detect,
    load_official,
    losses,
    mask_sensor,
)


def architecture_named(name: str, changes: Mapping[str, Any] | None = None) -> Architecture:
    """One of ``ARCHITECTURES``, with changes."""
    return replace(ARCHITECTURES[name], **(changes or {}))


def to_middle(boxes: LiDARInstance3DBoxes) -> Tensor:
    """Boxes (n, 9) with their centre in the middle."""
    return torch.cat([boxes.gravity_center, boxes.tensor[:, 3:]], 1)


def to_bottom(found: Detections) -> InstanceData:
    """Detections as MMDetection3D stores them, centres at the bottom."""
    boxes = found.boxes.clone()
    boxes[:, 2] -= boxes[:, 5] / 2
    made = LiDARInstance3DBoxes(boxes, box_dim=9)
    return InstanceData(bboxes_3d=made, scores_3d=found.scores, labels_3d=found.labels)


@TRANSFORMS.register_module(force=True)
class CMTSample(BaseTransform):
    """What happens to a loaded frame: masked modalities and augmentation in training, resizing, calibration.

    Args:
        architecture: name, for the range. size: height and width of the images. training: with augmentation.
        masked: with masked modalities, in training. zoom: range of the images' random zoom.
    """

    def __init__(
        self,
        architecture: str,
        size: tuple[int, int],
        training: bool = False,
        masked: bool = False,
        zoom: tuple[float, float] = (0.94, 1.25),
    ) -> None:
        self.architecture, self.size = architecture_named(architecture), tuple(size)
        self.training, self.masked, self.zoom = training, masked, tuple(zoom)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change ``points``, ``img`` and the ground truth; add ``lidar2img``, (views, 4, 4)."""
        generator = torch.Generator().manual_seed(int(np.random.randint(2**31)))
        pc_range = self.architecture.pc_range
        boxes = results.get("gt_bboxes_3d")
        sample = Sample(
            torch.from_numpy(np.stack(results["img"])).permute(0, 3, 1, 2).float(),
            results["points"].tensor,
            torch.from_numpy(np.stack([np.asarray(k)[:3, :3] for k in results["cam2img"]])).double(),
            torch.from_numpy(np.stack(results["lidar2cam"])).double(),
            torch.zeros(0, 9) if boxes is None else to_middle(boxes),
            torch.zeros(0, dtype=torch.long) if boxes is None else torch.from_numpy(results["gt_labels_3d"]),
        )
        if self.training:
            if self.masked:
                draw = float(torch.rand(1, generator=generator))
                sample.images, sample.points = mask_sensor(sample.images, sample.points, draw)
            transform(sample, draw_transform(JITTER[self.architecture.modality], generator))
        keep_in_range(sample, pc_range)
        resize_crop_flip(sample, self.size, self.zoom, generator if self.training else None)
        results["img"] = list(sample.images.permute(0, 2, 3, 1).numpy())
        results["points"] = results["points"].new_point(sample.points)
        results["lidar2img"] = sample.lidar2img.numpy()
        if boxes is not None:
            centred = LiDARInstance3DBoxes(sample.boxes, box_dim=9, origin=(0.5, 0.5, 0.5))
            results["gt_bboxes_3d"], results["gt_labels_3d"] = centred, sample.labels.numpy()
        return results


@MODELS.register_module(force=True)
class CMTDetector(Base3DDetector):
    """The detector.

    Args:
        architecture: one of ``ARCHITECTURES``. changes: fields of it to change. official: the authors' checkpoint.
        data_preprocessor, init_cfg: as for any detector.
    """

    def __init__(
        self,
        architecture: str = "fusion-vov",
        changes: Mapping[str, Any] | None = None,
        official: str = "",
        data_preprocessor: Any = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        made = architecture_named(architecture, changes)
        self.net = CMT(made, *branches(made))
        if official:
            content = torch.load(official, map_location="cpu", weights_only=True)
            load_official(self.net, content.get("state_dict", content))

    def _predictions(self, inputs: Mapping[str, Any], samples: Sequence[Any], targets: Targets | None = None) -> Any:
        images = inputs.get("imgs")
        projections = None
        if images is not None:
            projections = torch.from_numpy(np.stack([sample.metainfo["lidar2img"] for sample in samples]))
        return self.net(Batch(images, inputs.get("points"), projections), targets)

    def loss(self, batch_inputs_dict: dict, batch_data_samples: list, **kwargs: Any) -> dict[str, Tensor]:
        """Losses of a batch."""
        truth = [sample.gt_instances_3d for sample in batch_data_samples]
        targets = Targets.pad([to_middle(t.bboxes_3d) for t in truth], [t.labels_3d for t in truth])
        device = self.net.head.reference_points.device
        targets = targets.to(device)
        found = losses(self._predictions(batch_inputs_dict, batch_data_samples, targets), targets)
        return {f"loss_{name}": value for name, value in found.items()}

    def predict(self, batch_inputs_dict: dict, batch_data_samples: list, **kwargs: Any) -> list:
        """Data samples with ``pred_instances_3d``."""
        found = detect(self._predictions(batch_inputs_dict, batch_data_samples))
        return self.add_pred_to_datasample(batch_data_samples, [to_bottom(rows) for rows in found])

    def _forward(self, batch_inputs_dict: dict, batch_data_samples: list, **kwargs: Any) -> Any:
        """Raw predictions of all decoder layers."""
        return self._predictions(batch_inputs_dict, batch_data_samples)

    def extract_feat(self, batch_inputs: Any) -> Any:
        """Not used: the branches are called inside of the detector."""
        raise NotImplementedError("CMT's branches are self.net.image and self.net.lidar")
