"""The rivals: what a team would otherwise do about a fine-tune that lost its refusals. One file each, one interface.

`METHODS` holds them by the name that recipes use; `safegene bench` puts them in one table.
"""

from __future__ import annotations

from safegene.baselines.alpha_steer import AlphaSteer
from safegene.baselines.cast import ConditionalSteering
from safegene.baselines.dpo import Dpo, RedTeamDpo
from safegene.baselines.fold import Fold
from safegene.baselines.guard import Guard
from safegene.baselines.method import Cost, Method, Protected, Setting
from safegene.baselines.nothing import Nothing
from safegene.baselines.ours import Adapter, Uncalibrated
from safegene.baselines.safe_lora import SafeLora
from safegene.baselines.safe_merge import SafeMerge
from safegene.baselines.safety_vector import LowRankVector, SafetyVector
from safegene.baselines.self_correction import SelfCorrection
from safegene.baselines.sft import RedTeamSft, Sft
from safegene.baselines.system_prompt import SystemPrompt

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Nothing, SystemPrompt, Adapter, Uncalibrated, Fold, Sft, RedTeamSft, Dpo, RedTeamDpo, SelfCorrection, Guard, SafetyVector, LowRankVector, SafeLora,
        SafeMerge, ConditionalSteering, AlphaSteer,
    )
}  # fmt: skip

__all__ = ["Adapter", "Cost", "METHODS", "Method", "Protected", "Setting"]
