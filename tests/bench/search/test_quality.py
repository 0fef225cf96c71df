import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from bench.search.quality import Quality
from bench.search.space import student_after
from distill.checkpoints.surgery import make_student_unet
from distill.models.architectures import ARCHITECTURES, find_architecture
from distill.models.conditioning import call_unet
from distill.models.depth import Depth
from distill.models.families import MINI_FAMILY
from distill.models.module_map import make_module_map

TEACHER = "-/2/2:2:2,2,2/1,1,1/-"


@pytest.fixture(scope="module")
def teacher() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**find_architecture("-/2,2/2,2:2:2,2,2/2,2,2/-", MINI_FAMILY).unet_config).eval()
