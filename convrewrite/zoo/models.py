"""Which models the zoo holds: torchvision's all, the smallest of each timm family, and those of the other sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TIMM = {
    "byoanet": "eca_botnext26ts_256",
    "byobnet": "mobileone_s1",
    "coat": "coat_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "efficientnet_lite0",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "mambaout_femto",
    "maxxvit": "maxvit_pico_rw_256",
    "metaformer": "poolformerv2_s12",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "nf_regnet_b0",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "resnet10t",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""timm's families (its modules) that hold a spatial convolution, and the smallest member of each."""

PATCHES = {
    "beit": "beit_base_patch16_224",
    "cait": "cait_xxs24_224",
    "convit": "convit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "mlp_mixer": "gmlp_ti16_224",
    "qwen3_vit": "qwen3_vit_88m",
    "sequencer": "sequencer2d_s",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_relpos": "vit_srelpos_small_patch16_224",
}
"""Families whose only convolutions larger than 1x1 cut the image into patches or stand beside tokens."""

HUGGING_FACE = (
    "resnet",
    "regnet",
    "convnext",
    "convnextv2",
    "mobilenet_v1",
    "mobilenet_v2",
    "efficientnet?image_size=224",
    "ResNetBackbone",
    "ConvNextBackbone",
    "detr",
    "mask2former",
    "segformer",
    "upernet",
)
SEGMENTATION = (
    "Unet",
    "UnetPlusPlus",
    "MAnet",
    "Linknet",
    "FPN",
    "PSPNet",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "UPerNet",
)
ULTRALYTICS = (
    "yolov8n",
    "yolov8n-seg",
    "yolov8n-cls",
    "yolov8n-pose",
    "yolov5n",
    "yolov9t",
    "yolov10n",
    "yolo11n",
    "yolo12n",
)


# Few and small boxes: what is tried is that all parts run, not what an untrained detector finds.
_PIXELS = "min_size=96&max_size=128"
_TWO_STAGES = (
    f"{_PIXELS}&rpn_pre_nms_top_n_train=20&rpn_post_nms_top_n_train=20&rpn_pre_nms_top_n_test=20"
    "&rpn_post_nms_top_n_test=20&box_batch_size_per_image=16&box_detections_per_img=5"
)
_ONE_STAGE = "detections_per_img=5&topk_candidates=20"

SMALL = 64
"""Pixels on a side that are enough to tell stages apart."""

SMALLER: dict[str, tuple[str, int]] = {
    "torchvision:fasterrcnn": (_TWO_STAGES, 96),
    "torchvision:maskrcnn": (_TWO_STAGES, 96),
    "torchvision:keypointrcnn": (_TWO_STAGES, 96),
    "torchvision:fcos": (f"{_PIXELS}&{_ONE_STAGE}", 96),
    "torchvision:retinanet": (f"{_PIXELS}&{_ONE_STAGE}", 96),
    "torchvision:ssd": (_ONE_STAGE, 96),
    "torchvision:raft": ("", 128),
    "timm:inception": ("", 139),
    "timm:deepseek_vit": ("depth=2", 64),  # its only convolution stands before 32 equal blocks
    "timm:efficientvim": ("", 224),  # at 64 its last batch norms see two values each, and rounding decides their signs
    "timm:rexnet": ("", 128),  # eight values, and 27 layers of swish behind them
}
"""How a spec begins -> options for the builder and pixels on a side, for models that are slow or refuse 64 pixels."""


def smaller(spec: str) -> tuple[str, int]:
    """The spec as the zoo builds it, and the pixels on a side that it tries first."""
    options, pixels = next((small for start, small in SMALLER.items() if spec.startswith(start)), ("", SMALL))
    return spec if not options or "?" in spec else f"{spec}?{options}", pixels


@dataclass(frozen=True)
class Entry:
    """One model of the zoo: its group, its family in the group ("" if the group has none) and its name as a source."""

    group: str
    family: str
    spec: str


def _torchvision() -> list[Entry]:
    from torchvision.models import get_model_builder, list_models

    families = {name: get_model_builder(name).__module__.removeprefix("torchvision.models.") for name in list_models()}
    return [Entry("torchvision", families[name], f"torchvision:{name}") for name in sorted(families)]


def _timm() -> list[Entry]:
    import timm

    here = set(timm.list_modules())
    return [Entry("timm", family, f"timm:{name}") for family, name in TIMM.items() if family in here]


def _patches() -> list[Entry]:
    import timm

    here = set(timm.list_modules())
    return [Entry("timm, patches only", family, f"timm:{name}") for family, name in PATCHES.items() if family in here]


def _features() -> list[Entry]:
    names = ("resnet10t", "convnext_atto", "hrnet_w18_small", "efficientnet_lite0", "mobilenetv3_small_050")
    return [Entry("timm features_only", "", f"timm:{name}?features_only=1") for name in names]


GROUPS: dict[str, tuple[str, Callable[[], list[Entry]]]] = {
    "torchvision": ("torchvision", _torchvision),
    "timm": ("timm", _timm),
    "features": ("timm", _features),
    "patches": ("timm", _patches),
    "hf": ("transformers", lambda: [Entry("transformers", "", f"hf:{name}") for name in HUGGING_FACE]),
    "smp": (
        "segmentation_models_pytorch",
        lambda: [
            Entry("segmentation_models_pytorch", "", f"smp:{name}?encoder_name=resnet18") for name in SEGMENTATION
        ],
    ),
    "ultralytics": (
        "ultralytics",
        lambda: [Entry("ultralytics", "", f"ultralytics:{name}") for name in ULTRALYTICS],
    ),
}
"""Group -> the package it needs and the function that lists its models."""
