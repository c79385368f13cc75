"""Expected parts and roles of dense models, counted by hand from their source; for `test_parts.py`. No torch here.

A line is (part, role, stage) -> number of convolutions, a module that is called several times counted once.
`docs/roles.md` defines part, role and stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Key = tuple[str, str, int]

# torchvision/models/resnet.py: conv1; 3, 4, 6, 3 bottlenecks; the first block of each stage has a projection.
RESNET50: dict[Key, int] = {
    ("backbone", "stem", 0): 1,
    ("backbone", "bottleneck_spatial", 1): 3,
    ("backbone", "bottleneck_spatial", 2): 4,
    ("backbone", "bottleneck_spatial", 3): 6,
    ("backbone", "bottleneck_spatial", 4): 3,
    ("backbone", "pointwise", 1): 6,
    ("backbone", "pointwise", 2): 8,
    ("backbone", "pointwise", 3): 12,
    ("backbone", "pointwise", 4): 6,
    ("backbone", "shortcut", 1): 1,
    ("backbone", "downsample", 2): 1,
    ("backbone", "downsample", 3): 1,
    ("backbone", "downsample", 4): 1,
}
# replace_stride_with_dilation=[False, True, True]: layer3 and layer4 keep layer2's size, their projections stride 1.
DILATED50 = {k: n for k, n in RESNET50.items() if k[1] != "downsample" or k[2] == 2} | {
    ("backbone", "shortcut", 3): 1,
    ("backbone", "shortcut", 4): 1,
}
# torchvision/models/mobilenetv3.py, large: blocks of stage 1 (112 px), 2 (56), 3 (28), 4 (14), 5 (7): 1, 2, 3, 6, 3;
# the first has no expansion; gates of two convolutions in the 3 of stage 3, the last 2 of stage 4 and the 3 of stage 5.
MOBILE: dict[Key, int] = {
    ("backbone", "stem", 0): 1,
    ("backbone", "depthwise", 1): 1,
    ("backbone", "depthwise", 2): 2,
    ("backbone", "depthwise", 3): 3,
    ("backbone", "depthwise", 4): 6,
    ("backbone", "depthwise", 5): 3,
    ("backbone", "pointwise", 1): 1,
    ("backbone", "pointwise", 2): 4,
    ("backbone", "pointwise", 3): 6,
    ("backbone", "pointwise", 4): 12,
    ("backbone", "pointwise", 5): 6,
    ("backbone", "se", 3): 6,
    ("backbone", "se", 4): 4,
    ("backbone", "se", 5): 6,
}
# dilated=True keeps the size of stage 4 to the end: its 9 blocks are one stage; features.16 is a 1x1 after them.
DILATED_MOBILE = {k: n for k, n in MOBILE.items() if k[2] < 4} | {
    ("backbone", "depthwise", 4): 9,
    ("backbone", "pointwise", 4): 18,
    ("backbone", "se", 4): 10,
    ("backbone", "transition", 4): 1,
}


def _fpn(levels: range) -> dict[Key, int]:
    """torchvision/ops/feature_pyramid_network.py: a 1x1 and a 3x3 for each level."""
    return {("neck", role, stage): 1 for stage in levels for role in ("pointwise", "basic_spatial")}


# torchvision/models/resnet.py: conv1; 3, 4, 6, 3 basic blocks of two 3x3; projections from layer2 on.
RESNET34: dict[Key, int] = {
    ("backbone", "stem", 0): 1,
    ("backbone", "basic_spatial", 1): 6,
    ("backbone", "basic_spatial", 2): 8,
    ("backbone", "basic_spatial", 3): 12,
    ("backbone", "basic_spatial", 4): 6,
    ("backbone", "downsample", 2): 1,
    ("backbone", "downsample", 3): 1,
    ("backbone", "downsample", 4): 1,
}


@dataclass(frozen=True)
class Dense:
    """One model: a torchvision name, one with its source before a colon, or a small network of the test in capitals.

    Attributes:
        sites: some of them, path -> (part, role, stage). other: convolutions that are not 2-D, op -> number.
    """

    family: str
    model: str
    counts: Mapping[Key, int]
    sites: Mapping[str, Key] = field(default_factory=dict)
    other: Mapping[str, int] = field(default_factory=dict)
    size: int = 224


TABLES = [
    Dense(
        "faster_rcnn",
        "fasterrcnn_resnet50_fpn",  # rpn: 3x3, class, box; the box head is linear
        {**RESNET50, **_fpn(range(1, 5)), ("head", "head", 4): 3},
        {
            "backbone.body.layer3.0.conv2": ("backbone", "bottleneck_spatial", 3),
            "backbone.fpn.inner_blocks.0.0": ("neck", "pointwise", 1),
            "backbone.fpn.inner_blocks.3.0": ("neck", "pointwise", 4),
            "backbone.fpn.layer_blocks.2.0": ("neck", "basic_spatial", 3),
            "rpn.head.conv.0.0": ("head", "head", 4),
            "rpn.head.bbox_pred": ("head", "head", 4),
        },
    ),
    Dense(
        "faster_rcnn",
        "fasterrcnn_resnet50_fpn_v2",  # two 3x3 in the rpn, four in the box head
        {**RESNET50, **_fpn(range(1, 5)), ("head", "head", 4): 8},
        {"roi_heads.box_head.3.0": ("head", "head", 4)},
    ),
    Dense(
        "faster_rcnn",
        "fasterrcnn_mobilenet_v3_large_fpn",  # both levels of the FPN, features.13 and .16, are of one resolution
        {
            **MOBILE,
            ("backbone", "transition", 5): 1,
            ("neck", "pointwise", 5): 2,
            ("neck", "basic_spatial", 5): 2,
            ("head", "head", 5): 3,
        },
        {
            "backbone.body.16.0": ("backbone", "transition", 5),
            "backbone.fpn.inner_blocks.0.0": ("neck", "pointwise", 5),
        },
    ),
    Dense(
        "mask_rcnn",
        "maskrcnn_resnet50_fpn",  # as Faster R-CNN, and four 3x3 and a 1x1 for masks
        {**RESNET50, **_fpn(range(1, 5)), ("head", "head", 4): 8},
        {"roi_heads.mask_head.0.0": ("head", "head", 4)},
        {"conv_transpose2d": 1},
    ),
    Dense(
        "keypoint_rcnn",
        "keypointrcnn_resnet50_fpn",  # as Faster R-CNN, and eight 3x3 for key points
        {**RESNET50, **_fpn(range(1, 5)), ("head", "head", 4): 11},
        {"roi_heads.keypoint_head.14": ("head", "head", 4)},
        {"conv_transpose2d": 1},
    ),
    Dense(
        "retinanet",
        "retinanet_resnet50_fpn",  # levels from layer2 on; p6, p7 from P5; two heads of four 3x3 and one more
        {**RESNET50, **_fpn(range(2, 5)), ("neck", "downsample", 4): 2, ("head", "head", 4): 10},
        {
            "backbone.fpn.extra_blocks.p6": ("neck", "downsample", 4),
            "backbone.fpn.layer_blocks.0.0": ("neck", "basic_spatial", 2),
            "head.regression_head.bbox_reg": ("head", "head", 4),
        },
    ),
    Dense(
        "retinanet",
        "retinanet_resnet50_fpn_v2",  # p6 from the backbone's last map
        {**RESNET50, **_fpn(range(2, 5)), ("neck", "downsample", 4): 2, ("head", "head", 4): 10},
    ),
    Dense(
        "fcos",
        "fcos_resnet50_fpn",  # two towers of four 3x3; class, box and centre
        {**RESNET50, **_fpn(range(2, 5)), ("neck", "downsample", 4): 2, ("head", "head", 4): 11},
        {"head.regression_head.bbox_ctrness": ("head", "head", 4)},
    ),
    Dense(
        "deeplabv3",
        "deeplabv3_resnet50",  # ASPP: 1x1, three dilated 3x3, pooled 1x1, project; then 3x3 and 1x1
        {**DILATED50, ("head", "head", 4): 8},
        {
            "backbone.layer4.0.downsample.0": ("backbone", "shortcut", 4),
            "classifier.0.convs.4.1": ("head", "head", 4),
            "classifier.4": ("head", "head", 4),
        },
    ),
    Dense(
        "deeplabv3",
        "deeplabv3_mobilenet_v3_large",
        {**DILATED_MOBILE, ("head", "head", 4): 8},
        {"backbone.16.0": ("backbone", "transition", 4)},
    ),
    Dense(
        "fcn",
        "fcn_resnet50",  # 3x3 and 1x1
        {**DILATED50, ("head", "head", 4): 2},
        {"classifier.0": ("head", "head", 4), "classifier.4": ("head", "head", 4)},
    ),
    Dense(
        "lraspp",
        "lraspp_mobilenet_v3_large",  # cbr narrows, scale gates, and the two classifiers are summed
        {
            **DILATED_MOBILE,
            ("neck", "pointwise", 4): 1,
            ("neck", "se", 4): 1,
            ("head", "head", 4): 2,
        },
        {
            "classifier.cbr.0": ("neck", "pointwise", 4),
            "classifier.scale.1": ("neck", "se", 4),
            "classifier.low_classifier": ("head", "head", 4),
        },
    ),
    Dense(
        "ssd",
        # VGG-16's 13 (stages at 300, 150, 75, 38, 19 px), fc6 and fc7 at 19, then pairs of 1x1 and 3x3:
        # 19 > 10, 10 > 5, 5 > 3, 3 > 1. Heads: two 3x3 on each of six maps.
        "ssd300_vgg16",
        {
            ("backbone", "stem", 0): 1,
            ("backbone", "basic_spatial", 1): 1,
            ("backbone", "basic_spatial", 2): 2,
            ("backbone", "basic_spatial", 3): 3,
            ("backbone", "basic_spatial", 4): 3,
            ("backbone", "basic_spatial", 5): 4,
            ("backbone", "pointwise", 5): 2,
            ("backbone", "basic_spatial", 6): 1,
            ("backbone", "pointwise", 6): 1,
            ("backbone", "basic_spatial", 7): 1,
            ("backbone", "pointwise", 7): 1,
            ("backbone", "basic_spatial", 8): 1,
            ("backbone", "pointwise", 8): 1,
            ("backbone", "basic_spatial", 9): 1,
            ("head", "head", 9): 12,
        },
        {"backbone.features.0": ("backbone", "stem", 0), "head.classification_head.module_list.5": ("head", "head", 9)},
    ),
    Dense(
        "raft",
        # Two encoders: 7x7, three stages of two residual blocks of 3x3 3x3 at 112, 56, 28 px, projections in the
        # strided ones, a 1x1. Update block: correlation 1x1 3x3, flow 7x7 3x3, 3x3; two GRUs of three; flow head of
        # two; mask predictor of two.
        "raft_large",
        {
            ("backbone", "stem", 0): 2,
            ("backbone", "basic_spatial", 1): 8,
            ("backbone", "basic_spatial", 2): 8,
            ("backbone", "basic_spatial", 3): 8,
            ("backbone", "downsample", 2): 2,
            ("backbone", "downsample", 3): 2,
            ("backbone", "transition", 3): 2,
            ("head", "head", 3): 15,
        },
        {"update_block.flow_head.conv1": ("head", "head", 3), "context_encoder.conv": ("backbone", "transition", 3)},
    ),
    Dense(
        "u_net",
        # Encoder: two 3x3 at 32, 16 and 8 px. Decoder: two 3x3 at 16 and at 32 px after a transposed one each; 1x1.
        "UNET",
        {
            ("backbone", "stem", 0): 1,
            ("backbone", "basic_spatial", 1): 1,
            ("backbone", "basic_spatial", 2): 2,
            ("backbone", "basic_spatial", 3): 2,
            ("neck", "basic_spatial", 2): 2,
            ("neck", "basic_spatial", 1): 2,
            ("head", "head", 3): 1,
        },
        {
            "down.2.0": ("backbone", "basic_spatial", 3),
            "merge.0.0": ("neck", "basic_spatial", 2),
            "merge.1.2": ("neck", "basic_spatial", 1),
            "out": ("head", "head", 3),
        },
        {"conv_transpose2d": 2},
        32,
    ),
    Dense(
        "residual_u_net",
        # Stem at 16 px; residual blocks at 16 and, with a projection, 8 px; the decoder ends at the image's 32 px with
        # one 3x3 and a residual block before that, at 16.
        "RESUNET",
        {
            ("backbone", "stem", 0): 1,
            ("backbone", "bottleneck_spatial", 1): 1,
            ("backbone", "pointwise", 1): 2,
            ("backbone", "bottleneck_spatial", 2): 1,
            ("backbone", "pointwise", 2): 2,
            ("backbone", "downsample", 2): 1,
            ("neck", "bottleneck_spatial", 1): 1,
            ("neck", "pointwise", 1): 3,
            ("neck", "basic_spatial", 0): 1,
            ("head", "head", 2): 1,
        },
        {
            "fuse": ("neck", "pointwise", 1),
            "up.conv2": ("neck", "bottleneck_spatial", 1),
            "last": ("neck", "basic_spatial", 0),
        },
        {},
        32,
    ),
    Dense(
        "res2net",
        # timm/models/res2net.py: ResNet-50's layout; the 3x3 is three of a quarter of the width, between the two 1x1.
        "timm:res2net50_26w_4s",
        {k: n * (3 if k[1] == "bottleneck_spatial" else 1) for k, n in RESNET50.items()},
        {
            "layer1.0.convs.0": ("backbone", "bottleneck_spatial", 1),
            "layer3.5.convs.2": ("backbone", "bottleneck_spatial", 3),
            "layer4.0.downsample.0": ("backbone", "downsample", 4),
        },
    ),
    Dense(
        "resnest",
        # timm/models/resnest.py: a deep stem of three; one bottleneck in each stage with a 3x3 in two groups and a gate
        # of two over them; strides are average poolings, so that all four projections have stride 1.
        "timm:resnest14d",
        {("backbone", "stem", 0): 3}
        | {
            ("backbone", role, stage): n
            for stage in range(1, 5)
            for role, n in {"bottleneck_spatial": 1, "pointwise": 2, "se": 2, "shortcut": 1}.items()
        },
        {
            "layer2.0.conv2.conv": ("backbone", "bottleneck_spatial", 2),
            "layer2.0.conv2.fc1": ("backbone", "se", 2),
            "layer2.0.downsample.1": ("backbone", "shortcut", 2),
        },
    ),
    Dense(
        "hrnet",
        # timm/models/hrnet.py: two strided 3x3; a bottleneck with a projection at 56 px. Branches at 56, 28, 14, 7 px
        # with two basic blocks each: two branches, then three, then four. What carries maps between branches: 1x1 from
        # branch j up to i (transition of its own size j), chains of strided 3x3 down (downsample of the size that each
        # gives). Head: a bottleneck with a projection on each branch, three strided 3x3 down, and a last 1x1.
        "timm:hrnet_w18_small",
        {
            ("backbone", "stem", 0): 2,
            ("backbone", "bottleneck_spatial", 1): 2,
            ("backbone", "pointwise", 1): 4,
            ("backbone", "shortcut", 1): 2,
            ("backbone", "basic_spatial", 1): 12,
            ("backbone", "transition", 1): 1,  # transition1.0
            ("backbone", "bottleneck_spatial", 2): 1,
            ("backbone", "pointwise", 2): 2,
            ("backbone", "shortcut", 2): 1,
            ("backbone", "basic_spatial", 2): 12,
            ("backbone", "transition", 2): 1 + 1 + 1,  # one in each fusion
            ("backbone", "downsample", 2): 1 + 1 + 2 + 3 + 1,  # transition1.1, three fusions, head
            ("backbone", "bottleneck_spatial", 3): 1,
            ("backbone", "pointwise", 3): 2,
            ("backbone", "shortcut", 3): 1,
            ("backbone", "basic_spatial", 3): 8,
            ("backbone", "transition", 3): 2 + 2,
            ("backbone", "downsample", 3): 1 + 2 + 4 + 1,  # transition2.2, two fusions, head
            ("backbone", "bottleneck_spatial", 4): 1,
            ("backbone", "pointwise", 4): 2,
            ("backbone", "shortcut", 4): 1,
            ("backbone", "basic_spatial", 4): 4,
            ("backbone", "transition", 4): 3,
            ("backbone", "downsample", 4): 1 + 3 + 1,  # transition3.3, one fusion, head
            ("head", "head", 4): 1,
        },
        {
            "transition1.0.0": ("backbone", "transition", 1),
            "transition1.1.0.0": ("backbone", "downsample", 2),
            "stage3.0.fuse_layers.0.2.0": ("backbone", "transition", 3),
            "stage4.0.fuse_layers.3.0.1.0": ("backbone", "downsample", 3),
            "stage4.0.branches.3.1.conv2": ("backbone", "basic_spatial", 4),
            "downsamp_modules.2.0": ("backbone", "downsample", 4),
            "final_layer.0": ("head", "head", 4),
        },
    ),
    Dense(
        "c2f",
        # ultralytics/cfg/models/v8/yolov8.yaml at depth 1/3: C2f of 1, 2, 2, 1 residual pairs of 3x3, between two 1x1;
        # the first 1x1 comes before the first block. The last 1x1 of SPPF narrows the map that is enlarged. The neck's
        # four C2f have one pair without a skip each. Detect: two towers of 3x3, 3x3, 1x1 on three levels, and dfl.
        "ultralytics:yolov8n",
        {
            ("backbone", "stem", 0): 3,
            ("backbone", "basic_spatial", 1): 2,
            ("backbone", "transition", 1): 1,
            ("backbone", "basic_spatial", 2): 4,
            ("backbone", "transition", 2): 2,
            ("backbone", "downsample", 2): 1,
            ("backbone", "basic_spatial", 3): 4,
            ("backbone", "transition", 3): 2,
            ("backbone", "downsample", 3): 1,
            ("backbone", "basic_spatial", 4): 2,
            ("backbone", "transition", 4): 3,
            ("backbone", "downsample", 4): 1,
            ("neck", "basic_spatial", 2): 2,
            ("neck", "pointwise", 2): 2,
            ("neck", "basic_spatial", 3): 4,
            ("neck", "pointwise", 3): 4,
            ("neck", "downsample", 3): 1,
            ("neck", "basic_spatial", 4): 2,
            ("neck", "pointwise", 4): 3,
            ("neck", "downsample", 4): 1,
            ("head", "head", 4): 19,
        },
        {
            "model.4.cv1.conv": ("backbone", "transition", 2),
            "model.4.m.1.cv2.conv": ("backbone", "basic_spatial", 2),
            "model.9.cv2.conv": ("neck", "pointwise", 4),
            "model.16.conv": ("neck", "downsample", 3),
            "model.22.cv2.0.0.conv": ("head", "head", 4),
            "model.22.dfl.conv": ("head", "head", 4),
        },
        size=640,
    ),
    Dense(
        "csp",
        # ultralytics/cfg/models/v5/yolov5.yaml at depth 1/3: C3 of 1, 2, 3, 1 residual pairs of 1x1, 3x3 on one of two
        # arms, each arm with a 1x1, one more after the join. In the neck a 1x1 before each enlarging; four C3 of one
        # pair without a skip; Detect as in YOLOv8.
        "ultralytics:yolov5n",
        {
            ("backbone", "stem", 0): 2,
            ("backbone", "basic_spatial", 1): 1,
            ("backbone", "pointwise", 1): 3,
            ("backbone", "transition", 1): 1,
            ("backbone", "basic_spatial", 2): 2,
            ("backbone", "pointwise", 2): 4,
            ("backbone", "transition", 2): 1,
            ("backbone", "downsample", 2): 1,
            ("backbone", "basic_spatial", 3): 3,
            ("backbone", "pointwise", 3): 5,
            ("backbone", "transition", 3): 1,
            ("backbone", "downsample", 3): 1,
            ("backbone", "basic_spatial", 4): 1,
            ("backbone", "pointwise", 4): 3,
            ("backbone", "transition", 4): 3,  # and the two of SPPF
            ("backbone", "downsample", 4): 1,
            ("neck", "basic_spatial", 2): 1,
            ("neck", "pointwise", 2): 4,
            ("neck", "basic_spatial", 3): 2,
            ("neck", "pointwise", 3): 9,
            ("neck", "downsample", 3): 1,
            ("neck", "basic_spatial", 4): 1,
            ("neck", "pointwise", 4): 5,
            ("neck", "downsample", 4): 1,
            ("head", "head", 4): 19,
        },
        {
            "model.2.cv1.conv": ("backbone", "pointwise", 1),
            "model.2.cv3.conv": ("backbone", "transition", 1),
            "model.10.conv": ("neck", "pointwise", 4),
        },
        size=640,
    ),
    Dense(
        "smp_unet",
        # segmentation_models_pytorch/decoders/unet: ResNet-34; five decoder blocks of two 3x3 at 14, 28, 56, 112 and
        # 224 px, the last two above stage 1; a 3x3 for the masks.
        "smp:Unet",
        {
            **RESNET34,
            ("neck", "basic_spatial", 3): 2,
            ("neck", "basic_spatial", 2): 2,
            ("neck", "basic_spatial", 1): 2,
            ("neck", "basic_spatial", 0): 4,
            ("head", "head", 4): 1,
        },
        {
            "decoder.blocks.0.conv1.0": ("neck", "basic_spatial", 3),
            "decoder.blocks.3.conv2.0": ("neck", "basic_spatial", 0),
            "segmentation_head.0": ("head", "head", 4),
        },
    ),
    Dense(
        "smp_fpn",
        # segmentation_models_pytorch/decoders/fpn: ResNet-34; a lateral 1x1 for each of four levels; a 3x3 before each
        # doubling on the way of P5 (7, 14, 28 px), P4 (14, 28) and P3 (28) to P2's 56 px, where P2 has one; a 1x1.
        "smp:FPN",
        {
            **RESNET34,
            **{("neck", "pointwise", stage): 1 for stage in (1, 2, 3, 4)},
            ("neck", "basic_spatial", 4): 1,
            ("neck", "basic_spatial", 3): 2,
            ("neck", "basic_spatial", 2): 3,
            ("neck", "basic_spatial", 1): 1,
            ("head", "head", 4): 1,
        },
        {
            "decoder.p5": ("neck", "pointwise", 4),
            "decoder.p2.skip_conv": ("neck", "pointwise", 1),
            "decoder.seg_blocks.0.block.2.block.0": ("neck", "basic_spatial", 2),
            "decoder.seg_blocks.3.block.0.block.0": ("neck", "basic_spatial", 1),
        },
    ),
    Dense(
        "darknet",
        # timm/models/cspnet.py, darknet53: a 3x3, then five stages at 112, 56, 28, 14, 7 px of a strided 3x3 and 1, 2,
        # 8, 8, 4 residual pairs of 1x1 and 3x3. The first strided one comes before every block.
        "timm:darknet53",
        {
            ("backbone", "stem", 0): 2,
            **{("backbone", "pointwise", s): n for s, n in zip(range(1, 6), (1, 2, 8, 8, 4), strict=True)},
            **{("backbone", "basic_spatial", s): n for s, n in zip(range(1, 6), (1, 2, 8, 8, 4), strict=True)},
            **{("backbone", "downsample", s): 1 for s in range(2, 6)},
        },
        {"stages.0.conv_down.conv": ("backbone", "stem", 0), "stages.1.conv_down.conv": ("backbone", "downsample", 2)},
    ),
    Dense(
        "convmixer",
        # timm/models/convmixer.py: patches of 7x7; 32 times a depthwise 9x9 under a skip, which is the block, and a
        # 1x1 after it, between two blocks; nothing but the last 1x1 comes after the last block.
        "timm:convmixer_768_32",
        {
            ("backbone", "stem", 0): 1,
            ("backbone", "depthwise", 1): 32,
            ("backbone", "transition", 1): 31,
            ("head", "head", 1): 1,
        },
    ),
    Dense(
        "vovnet",
        # timm/models/vovnet.py, vovnet39a: three 3x3; 1, 1, 2, 2 blocks at 56, 28, 14, 7 px that gather five 3x3 in a
        # row; a 1x1 after each concatenation. It is the one that the branches of the next block share where that
        # follows without a pooling, as in the last two stages; the last of all comes after the last block.
        "timm:vovnet39a",
        {
            ("backbone", "stem", 0): 3,
            **{("backbone", "basic_spatial", s): n for s, n in zip(range(1, 5), (5, 5, 10, 10), strict=True)},
            **{("backbone", "transition", s): 1 for s in (1, 2, 3)},
            **{("backbone", "pointwise", s): 1 for s in (3, 4)},
            ("head", "head", 4): 1,
        },
        {
            "stages.2.blocks.0.conv_concat.conv": ("backbone", "pointwise", 3),
            "stages.2.blocks.1.conv_concat.conv": ("backbone", "transition", 3),
            "stages.3.blocks.1.conv_concat.conv": ("head", "head", 4),
        },
    ),
    Dense(
        "resnetv2",
        # timm/models/resnetv2.py: ResNet-50 with the norms first; the classifier is a 1x1 convolution.
        "timm:resnetv2_50",
        {**RESNET50, ("head", "head", 4): 1},
        {"head.fc": ("head", "head", 4)},
    ),
]
