"""What the server that processes of tests are forked from imports once."""

import importlib
import warnings

warnings.simplefilter("ignore")
for name in (
    "torch", "transformers", "peft", "preftune.api", "preftune.cli", "preftune.model.load", "preftune.report.page",
    "preftune.training.job", "preftune.web.app", "preftune.web.serve", "safetensors.torch", "uvicorn",
    "transformers.models.auto.modeling_auto", "transformers.generation.utils", "transformers.models.llama.modeling_llama",
    "torch.nn.parallel.distributed", "torch._dynamo", "matplotlib.pyplot",
):  # fmt: skip
    importlib.import_module(name)

importlib.import_module("preftune.api").write_report = importlib.import_module("worlds").blank_page  # type: ignore[attr-defined]
