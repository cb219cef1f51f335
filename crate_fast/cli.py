"""The command `crate-fast`, which runs every program of the package; without arguments it lists them.

A command is a module with `main(argv) -> int`. It is imported after its command line has been parsed.
"""

import importlib
import sys

from crate_fast.errors import UserError, nearest, run_command
from crate_fast.options import PARSERS

COMMANDS = {
    "env": ("crate_fast.env", "versions, devices and backends of this machine"),
    "check": ("crate_fast.check", "check the kernels on this GPU; prints a table and writes a JSON report"),
    "pretrain": ("crate_fast.train.pretrain", "supervised pre-training"),
    "pretrain_mae": ("crate_fast.train.pretrain_mae", "masked autoencoding"),
    "finetune": ("crate_fast.train.finetune", "fine-tuning on other data"),
    "linear_probe": ("crate_fast.train.linear_probe", "a linear classifier on a frozen model (MAE's protocol)"),
    "explore": ("crate_fast.eval.explore.command", "a local page to look inside models"),
    "export": ("crate_fast.export", "ONNX and torch.export files of a model, checked against it"),
    "share": ("crate_fast.train.share", "a run's best model for timm and the Hugging Face Hub, with a model card"),
    "plan": ("crate_fast.train.plan", "cost of a training run: operations, memory, steps, hours"),
}
PROTOCOLS = {
    "attention_maps": "CLS attention of heads, under noise, of several models (Fig. 1, 2, 7, 8, 11 to 14)",
    "pca": "principal components of patch features by layer (Fig. 3, 6, 9)",
    "coarse_segmentation": "mIoU of attention maps and objects (Fig. 4)",
    "localization": "boxes from attention maps: MaxBoxAcc, GT-known, pointing game",
    "maskcut": "objects by MaskCut, AP and AR (Table 1, Fig. 5)",
    "by_layer": "AP and mIoU at every layer (Fig. 6)",
    "by_epoch": "AP, mIoU and components at every checkpoint of a run (Fig. 10)",
    "comparison": "several models in one table with the paper's numbers (Tables 1 and 2, Fig. 4)",
    "white_box": "R^c and sparsity of every layer",
    "reconstruction": "masked patches reconstructed by a CRATE-MAE, by mask ratio",
    "classify": "top-1 and top-5, k-NN, linear probe",
}
EXPERIMENTS = {"emergence": "does segmentation appear in CRATE and not in a ViT? (Fig. 4, 6, 7, 9, 10; Table 2)"}
# Word → (kind, entries, package of their modules, suffix of the module name)
GROUPS = {
    "eval": ("protocol", PROTOCOLS, "crate_fast.eval", ""),
    "reproduce": ("experiment", EXPERIMENTS, "crate_fast.eval", ".command"),
}


def _listing(title: str, entries: dict[str, str]) -> str:
    width = max(map(len, entries))
    return title + "".join(f"\n  {name:<{width}}  {text}" for name, text in entries.items())


def _choose(kind: str, name: str, entries: dict[str, str]) -> None:
    if name not in entries:
        raise UserError(f"no {kind} {name!r}{nearest(name, entries)}; choose one of {', '.join(entries)}")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    return run_command(_dispatch, list(sys.argv[1:] if argv is None else argv))


def _dispatch(words: list[str]) -> int:
    commands = {name: text for name, (_, text) in COMMANDS.items()}
    commands |= {"eval": "an evaluation protocol", "reproduce": "an experiment, from training to its report"}
    if not words or words[0] in ("-h", "--help"):
        print(_listing("usage: crate-fast COMMAND …\n", commands))
        return 0
    _choose("command", words[0], commands)
    if words[0] not in GROUPS:
        return _run(words[0], COMMANDS[words[0]][0], words[1:])
    kind, entries, package, module = GROUPS[words[0]]
    if len(words) == 1 or words[1] in ("-h", "--help"):
        usage = f"usage: crate-fast {words[0]} {kind.upper()} … (with --help for the options of one)\n"
        print(_listing(usage, entries))
        return 0
    _choose(kind, words[1], entries)
    return _run(f"{words[0]} {words[1]}", f"{package}.{words[1]}{module}", words[2:])


def _run(command: str, module: str, words: list[str]) -> int:
    if command in PARSERS:
        PARSERS[command]().parse_args(words)  # report errors and --help before the slow imports
    return importlib.import_module(module).main(words)


if __name__ == "__main__":
    sys.exit(main())
