"""Every kind of scheduler, and what becomes of it with each family: the one list that tests and pages go by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import diffusers

EULER = "FlowMatchEulerDiscreteScheduler"
HEUN = "FlowMatchHeunDiscreteScheduler"
UNIPC = "UniPCMultistepScheduler"
DPM = "DPMSolverMultistepScheduler"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FAMILIES = ("qwen", "flux", "sd3")
PIPELINES = {"qwen": "QwenImagePipeline", "flux": "FluxPipeline", "sd3": "StableDiffusion3Pipeline"}


class Case(NamedTuple):
    """`works`: the families whose stock pipeline takes it; the others are refused with a sentence that has `says`."""

    name: str
    config: dict[str, Any]
    works: tuple[str, ...] = FAMILIES
    says: str = ""

    def scheduler(self) -> Any:
        return getattr(diffusers, self.name)(**self.config)


CASES = {
    "euler": Case(EULER, {}),
    "euler, shift 3": Case(EULER, {"shift": 3.0}),
    "euler, dynamic": Case(EULER, {"use_dynamic_shifting": True}),
    "euler, dynamic, linear": Case(EULER, {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
    "euler, terminal": Case(EULER, {"use_dynamic_shifting": True, "shift_terminal": 0.02}),
    "euler, karras": Case(EULER, {"use_karras_sigmas": True}),
    "euler, exponential": Case(EULER, {"use_exponential_sigmas": True}),
    "euler, beta": Case(EULER, {"use_beta_sigmas": True}),
    "euler, stochastic": Case(EULER, {"stochastic_sampling": True}, (), "does not depend on its seed alone"),
    "euler, inverted": Case(EULER, {"invert_sigmas": True}, (), "invert_sigmas: false"),
    "heun": Case(HEUN, {"shift": 3.0}, ("sd3",), "does not take the sigmas that a"),
    "lcm": Case("FlowMatchLCMScheduler", {}, (), "does not depend on its seed alone"),
    "unipc": Case(UNIPC, FLOW | {"flow_shift": 3.0}),
    "unipc, order 3": Case(UNIPC, FLOW | {"solver_order": 3}),
    "unipc, dynamic": Case(UNIPC, FLOW | {"use_dynamic_shifting": True}),
    "unipc, karras": Case(UNIPC, FLOW | {"use_karras_sigmas": True}, (), "use_karras_sigmas: false"),
    "unipc, no flow": Case(UNIPC, {}, (), "use_flow_sigmas: true and prediction_type: flow_prediction"),
    "dpm": Case(DPM, FLOW | {"flow_shift": 3.0}, ("sd3",), "FlowMatchEulerDiscreteScheduler"),
    "dpm, order 3": Case(DPM, FLOW | {"solver_order": 3}, ("sd3",), "FlowMatchEulerDiscreteScheduler"),
    "dpm, dynamic": Case(DPM, FLOW | {"use_dynamic_shifting": True}, ("flux", "sd3"), "does not take the sigmas"),
    "dpm, stochastic": Case(DPM, FLOW | {"algorithm_type": "sde-dpmsolver++"}, (), "algorithm_type: dpmsolver++"),
    "dpm, no flow": Case(DPM, {}, (), "use_flow_sigmas: true and prediction_type: flow_prediction"),
    "euler without flow": Case("EulerDiscreteScheduler", {}, (), "is not known to sample flows"),
}


def with_scheduler(folder: Path, name: str) -> Path:
    """A teacher's folder, with the scheduler of a case in place of its own."""
    scheduler = CASES[name].scheduler()
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"scheduler": ["diffusers", CASES[name].name]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


WORKING = [(name, family) for name, case in CASES.items() for family in case.works]
REFUSED = [(name, family) for name, case in CASES.items() for family in FAMILIES if family not in case.works]
