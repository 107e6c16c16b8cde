"""The commands: documented examples parse, mistakes get an answer, scores have the right form."""

import contextlib
import functools
import importlib
import json
import re
import shlex
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro
from flax import nnx

import demo
from benchmarks import inference as inference_benchmark
from dvmsr_jax import images, parallel
from dvmsr_jax.commands import data, evaluate, export, train, upscale, web
from dvmsr_jax.config import ModelConfig
from dvmsr_jax.configs import PRESETS
from dvmsr_jax.kernels.selective_scan import native, triton_scan
from dvmsr_jax.model import DVMSR
from dvmsr_jax.pretrained import save_safetensors
from dvmsr_jax.samples import SAMPLES
from experiments import __main__ as study_commands

ROOT = Path(__file__).resolve().parents[1]
# Logs may contain commands of older versions.
GUIDES = [path for path in (ROOT / "docs").glob("*.md") if path.name != "experiments.md"]
COMMANDS = sorted(
    {
        line.split("  #")[0].strip()
        for path in (ROOT / "README.md", *GUIDES, *(ROOT / "configs").glob("*.py"))
        for line in path.read_text().splitlines()
        if re.match(r" *(python (\S+\.py|-m)|dvmsr) ", line)
    }
)


def parse_only(command):
    """A function with the same parameters that returns its arguments."""
    return functools.wraps(command)(lambda **options: options)


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_commands_parse(command, monkeypatch):
    python, program, *arguments = shlex.split(command)
    if python == "dvmsr":
        program += ".py"
    elif program == "-m":
        program, *arguments = arguments
    if program == "train.py":
        assert train.parse(arguments).config.phase in command
    elif program == "upscale.py":
        inputs = arguments[: arguments.index("<")] if "<" in arguments else arguments
        assert upscale.parse(inputs).inputs
    elif program == "evaluate.py":
        assert evaluate.parse(arguments).ckpt
    elif program == "experiments":
        assert study_commands.parse(arguments).budget
    elif program.startswith("benchmarks."):
        main = importlib.import_module(program).main
        assert tyro.cli(parse_only(main), args=arguments)
    elif program == "data.py":
        commands = {name: parse_only(command) for name, command in data.COMMANDS.items()}
        assert tyro.extras.subcommand_cli_from_dict(commands, args=arguments)
    elif program == "export.py":
        assert tyro.cli(parse_only(export.export), args=arguments)
    elif program == "web.py":
        assert tyro.cli(parse_only(web.web), args=arguments)
    elif program == "weights.py":
        assert not arguments
    else:
        assert program == "convert.py"
        assert len(arguments) == 2


def test_the_documents_contain_commands():
    assert len(COMMANDS) >= 20


def test_phase_and_preset_choose_the_defaults():
    def parse(*arguments):
        return train.parse(arguments).config

    assert parse("--phase=teacher") == PRESETS["paper"]["teacher"]
    assert parse("--phase", "student") == PRESETS["paper"]["student"]
    config = parse("--phase=teacher", "--preset=demo", "--optim.learning-rate", "1e-3")
    assert config.model == PRESETS["demo"]["teacher"].model
    assert config.optim.learning_rate == 1e-3
    config = parse("--phase=student", "--data.hr-dirs", "a", "b", "--distill.level=mid")
    assert config.data.hr_dirs == (Path("a"), Path("b"))
    assert config.distill.level == "mid"


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--optim.learning-rat", "1"], "--optim.learning-rate"),
        (["--steps", "many"], "--steps"),
        (["--distill.level", "input"], "mid"),
        (["--scan", "fast"], "chunked"),
        (["--phase=students"], "student"),
        (["--profile=-3"], "--profile is -3"),
        (["--data.degradation=strong"], "mild"),
        (["--optim.warmup=2"], "--optim.warmup is 2"),
    ],
)
def test_mistakes_get_an_answer(arguments, answer, capsys):
    with pytest.raises(SystemExit) as stop:
        train.parse(arguments)
    assert stop.value.code != 0
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, evaluate, upscale, data, study_commands])
def test_help_keeps_the_layout_of_examples(program, monkeypatch, capsys):
    examples = re.findall(r"^ +(?:python|dvmsr) .*", program.__doc__, re.MULTILINE)
    assert examples
    monkeypatch.setattr("sys.argv", ["program", "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        program.main()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert {example.strip() for example in examples} <= set(lines)


def run_main(module, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, arguments)])
    module.main()


def test_errors_are_one_line(monkeypatch, weights, tmp_path):
    def error_of(module, *arguments):
        with pytest.raises(SystemExit) as stop:
            run_main(module, monkeypatch, *arguments)
        return stop.value.code

    monkeypatch.setattr(parallel, "start", lambda cluster: None)  # JAX is running already
    message = error_of(evaluate, "--ckpt", tmp_path / "nothing.pth")
    assert re.match(r"error: .*nothing\.pth: no such file", message)
    message = error_of(train, "--phase=teacher", "--distill.weight=2")
    assert message == "error: --distill.weight: for --phase=student only"
    message = error_of(train, "--phase=student", "--workdir", tmp_path)
    assert message.startswith("error: there is no teacher in")
    folders = ("--workdir", tmp_path / "run", "--data.hr-dirs", tmp_path / "none")
    message = error_of(train, "--phase=teacher", "--preset=demo", *folders)
    assert re.match(r"error: .*none: no such folder", message)

    for name, scan in (("triton", triton_scan), ("native", native)):
        monkeypatch.setattr(scan, "missing", lambda: "there is a reason")
        expected = f"error: the scan {name!r} cannot run here: there is a reason"
        options = ("--preset=demo", *folders, "--scan", name)  # before data are looked for
        assert error_of(train, "--phase=teacher", *options) == expected
        assert error_of(evaluate, "--ckpt", weights, "--scan", name) == expected


@pytest.fixture
def weights(tmp_path):
    """A file of tiny random weights."""
    config = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)
    path = tmp_path / "tiny.safetensors"
    save_safetensors(DVMSR(config, rngs=nnx.Rngs(0)), path)
    return path


def test_evaluation_prints_and_writes_scores(weights, tmp_path, monkeypatch, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    images.write_png(tmp_path / "Mine" / "HR" / "one.png", picture)
    result, saved = tmp_path / "out" / "scores.json", tmp_path / "sr"
    arguments = ("--ckpt", weights, "--data", tmp_path / "Mine", "--json", result)
    run_main(evaluate, monkeypatch, *arguments, "--save-images", saved, "--scan", "sequential")

    written = json.loads(result.read_text())
    scores = written["datasets"]["Mine"]
    assert written["model"]["parameters"] > 0
    assert scores["images"].keys() == {"one"}
    for group in (scores, scores["bicubic"], scores["images"]["one"]):
        assert 0 < group["psnr_y"] < 100
        assert -1 < group["ssim_y"] < 1
    assert images.read_rgb(saved / "Mine" / "one.png").shape == picture.shape
    printed = capsys.readouterr().out
    assert f"{scores['psnr_y']:.3f}" in printed
    assert f"{scores['bicubic']['ssim_y']:.4f}" in printed
    assert "GMACs" in printed


@pytest.mark.parametrize("reason", [None, "there is a reason"])
def test_commands_say_where_bfloat16_saves_no_time(reason, weights, tmp_path, monkeypatch, capsys):
    def said(module, *arguments):
        with contextlib.suppress(SystemExit):
            run_main(module, monkeypatch, *arguments, "--precision", "bfloat16")
        return [line for line in capsys.readouterr().err.splitlines() if "bfloat16" in line]

    monkeypatch.setattr(parallel, "start", lambda cluster: None)  # JAX is running already
    monkeypatch.setattr(train, "dry_run", lambda config: None)
    monkeypatch.setattr("dvmsr_jax.kernels.vimm.missing", lambda factors="float32": reason)
    images.write_png(tmp_path / "Mine" / "HR" / "one.png", np.zeros((24, 24, 3), np.uint8))
    evaluation = evaluate, "--ckpt", weights, "--data", tmp_path / "Mine"
    line = "--precision bfloat16 saves no time: {}".format
    expected = [] if reason is None else [line(reason)]
    assert said(*evaluation) == expected
    assert said(upscale, "--ckpt", weights, str(tmp_path / "Mine/HR/one.png")) == expected
    says = said(*evaluation, "--scan", "sequential")
    assert says == [line("with --scan sequential, JAX computes in float32 and rounds")]
    says = said(train, "--phase=teacher", "--dry-run")
    assert says == [line("on CPUs, it is for inference only")]


def test_evaluation_of_degraded_pictures(weights, tmp_path, monkeypatch, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    images.write_png(tmp_path / "Mine" / "HR" / "one.png", picture)
    result = tmp_path / "scores.json"
    arguments = ("--ckpt", weights, "--data", tmp_path / "Mine", "--json", result)
    run_main(evaluate, monkeypatch, *arguments)
    plain = json.loads(result.read_text())["datasets"]["Mine"]
    run_main(evaluate, monkeypatch, *arguments, "--degrade", "grid", "blur=1")
    cells = json.loads(result.read_text())["datasets"]
    assert len(cells) == 8
    assert cells["Mine clean"] == plain
    assert len({cell["psnr_y"] for cell in cells.values()}) == 8
    printed = capsys.readouterr().out
    for name, scores in cells.items():
        assert re.search(rf"^{name} +1 +{scores['psnr_y']:.3f} ", printed, re.MULTILINE)
    assert "Mine blur=1 noise=20 jpeg=50" in cells
    with pytest.raises(SystemExit, match="error: --degrade rain=1: expected blur=SIGMA"):
        run_main(evaluate, monkeypatch, *arguments, "--degrade", "rain=1")


def test_self_ensemble_changes_the_scores(weights, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    images.write_png(tmp_path / "Mine" / "HR" / "one.png", picture)
    plain, ensemble = (
        evaluate.run(evaluate.Arguments(ckpt=weights, data=(tmp_path / "Mine",), self_ensemble=on))[
            "datasets"
        ]["Mine"]["psnr_y"]
        for on in (False, True)
    )
    assert ensemble > plain  # the mean of eight outputs of a random model is less wrong


def test_scores_of_the_published_weights(shared, tmp_path):
    """Every image of Set5; Set14's take minutes here and are checked by evaluate.py itself."""
    expected = json.loads((shared / "reference" / "team07_scores.json").read_text())["Set5"]
    arguments = evaluate.Arguments(
        ckpt=shared / "reference" / "team07_DVMSR.pth", data=(shared / "data/benchmark/Set5",)
    )
    scores = evaluate.run(arguments)["datasets"]["Set5"]["images"]
    for name, (psnr_y, ssim_y) in expected.items():
        if name != "mean":
            assert abs(scores[name]["psnr_y"] - psnr_y) < 1e-3
            assert abs(scores[name]["ssim_y"] - ssim_y) < 2e-4


def test_demo_shows_a_picture_that_it_does_not_train_on():
    assert demo.HELD_OUT in {path.stem for path in SAMPLES}
    assert len(SAMPLES) - 1 > PRESETS["demo"]["teacher"].data.val_images


def test_data_from_folder_to_targets(weights, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for i in range(3):
        picture = rng.integers(0, 256, (40, 48, 3), np.uint8)
        images.write_png(tmp_path / "photos" / f"{i}.png", picture)
    records = tmp_path / "records"
    prepare = ("prepare", "--hr-dirs", tmp_path / "photos", "--val-images", 1, "--out", records)
    run_main(data, monkeypatch, *prepare)
    assert "2 for train, 1 for val sub-images of 3 pictures (0 left out)" in capsys.readouterr().out
    run_main(data, monkeypatch, "check", records)
    assert "no problems" in capsys.readouterr().out
    run_main(data, monkeypatch, "distill", "--ckpt", weights, "--data", records)
    assert str(records / "targets") in capsys.readouterr().out
    (target,) = (records / "targets").glob("*/00000.npy")

    target.write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        run_main(data, monkeypatch, "check", records)
    assert stop.value.code == "error: 1 problems"
    assert f"{target}: is damaged" in capsys.readouterr().out
    target.unlink()
    run_main(data, monkeypatch, "check", records)
    output = capsys.readouterr().out
    assert "0 of the 1 files" in output
    assert f"distill --ckpt {weights} --data {records}" in output
    assert "no problems" in output

    next(records.glob("*val.array_record*")).unlink()
    with pytest.raises(SystemExit) as stop:
        run_main(data, monkeypatch, "check", records)
    assert stop.value.code.startswith("error: 1 problems")
    assert "is missing" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run_main(data, monkeypatch, "check", tmp_path)
    assert re.match(r"error: .*: holds no prepared records", stop.value.code)
    with pytest.raises(SystemExit) as stop:
        run_main(data, monkeypatch, "check", tmp_path)
    assert re.match(r"error: .*: holds no prepared records", stop.value.code)


def test_inference_benchmark_measures_onnx_runtime(monkeypatch, capsys):
    pytest.importorskip("onnx", reason="needs the package onnx")
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    config = ModelConfig(channels=8, rssbs=1, vimms_per_rssb=1, states=4)
    monkeypatch.setattr(inference_benchmark, "CONFIG", config)
    monkeypatch.setattr(inference_benchmark, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(inference_benchmark, "apart", lambda function, *given: function(*given))
    inference_benchmark.main(sizes=("8",), precisions=(), onnx=True)
    rows = [line for line in capsys.readouterr().out.splitlines() if "ONNX Runtime" in line]
    assert [row.split(" | ")[1] for row in rows] == ["whole", "streaming"]


TORCH_MODEL = """
import torch

class Fourfold:
    def eval(self): return self
    def to(self, device): return self
    def __call__(self, x):
        assert x.array.shape[:2] == (1, 3) and x.array.dtype == "float32"
        return torch.from_numpy(x.array.repeat(4, 2).repeat(4, 3))

class Failing(Fourfold):
    def __call__(self, x): raise RuntimeError("no such kernel")
"""


def test_inference_benchmark_takes_models_in_pytorch(monkeypatch, capsys, tmp_path):
    """A stand-in has the parts of PyTorch that are used."""

    class Tensor:
        def __init__(self, array):
            self.array = array

        def to(self, device):
            assert device == ("cuda" if jax.default_backend() == "gpu" else "cpu")
            return self

        def cpu(self):
            return self

        def numpy(self):
            return self.array

    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    torch.from_numpy, torch.no_grad = Tensor, contextlib.nullcontext
    torch.cuda = types.SimpleNamespace(max_memory_allocated=lambda: 0)
    torch.backends = types.SimpleNamespace(cudnn=types.SimpleNamespace(allow_tf32=True))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(inference_benchmark, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(inference_benchmark, "apart", lambda function, *given: function(*given))
    file = tmp_path / "published_model.py"
    file.write_text(TORCH_MODEL)
    names = ("Fourfold", "Failing", "Missing")
    inference_benchmark.main(modes=(), sizes=("3", "4"), torch=tuple(f"{file}:{n}" for n in names))
    out, err = capsys.readouterr()
    rows = [line for line in out.splitlines() if "Fourfold in PyTorch" in line]
    assert [row.split("|")[1].strip() for row in rows] == ["3 x 3", "4 x 4", "whole"]
    failing, missing = err.splitlines()
    assert "Failing: fails on (1, 3, 3, 3) (no such kernel)" in failing
    assert "Missing: cannot be imported" in missing
    assert "Failing" not in out
    assert "Missing" not in out

    monkeypatch.setitem(sys.modules, "torch", None)
    inference_benchmark.main(modes=(), sizes=("3",), torch=(f"{file}:Fourfold", "gone.py:Model"))
    absent, gone = capsys.readouterr().err.splitlines()
    assert "PyTorch, which is not installed" in absent
    assert "gone.py:Model: expected FILE.py:CLASS" in gone


def test_growth_is_the_exponent():
    assert inference_benchmark.growth({n: 3e-6 * n**1.25 for n in (64, 256, 4096)}) == (
        pytest.approx(1.25)
    )
