"""`moelora launch`: what is refused before any process starts, real launches of two, and what a killed one leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

import moelora
from moelora.cli.app import main
from moelora.cli.launch_files import find_config, shipped
from moelora.cli.launchers import Failure, _of_deepspeed

pytest.importorskip("deepspeed")
# Each launch imports everything three times over.
pytestmark = pytest.mark.timeout(300)
ROOT = Path(__file__).parents[1]

# DeepSpeed compiles an operator of its own for processes on one CPU, which takes minutes; without it they use gloo.
WITHOUT_COMPILING = """
import collections, os
if "RANK" in os.environ and "moelora" in " ".join(__import__("sys").orig_argv):
    import deepspeed.ops
    vars(deepspeed.ops)["__compatible_ops__"] = collections.defaultdict(bool)
"""


def recipe_file(folder: Path, backbone: Path, **args: Any) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(40)))
    common = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    experts = {"num_experts": 4, "r": 4, "alpha": 8}
    # Without an auxiliary loss, which is of the tokens of one process where step_balance is off.
    router = {"kind": "topk", "top_k": 2, "aux_loss_coef": 0.0}
    recipe = {
        "backbone": {"name": str(backbone), "quantization": "fp32"},
        "mixture": {"sites": [{"target": "mlp", "experts": experts, "router": router}]},
        "data": {"kind": "dataset", "path": str(rows), "test_fraction": 0.0},
        "max_length": 64,
        "output_dir": str(folder / "run"),
        "trainer": {"args": {**common, **args}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(WITHOUT_COMPILING)
    path = os.pathsep.join([str(folder), str(Path(moelora.__file__).parents[1])])
    return {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "NO_COLOR": "1", "COLUMNS": "200"}


def start(environment: dict[str, str], *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moelora", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], seconds: float = 180) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher stops its processes
        pytest.fail(f"still running after {seconds} s: {process.communicate(timeout=30)[0]}")


# -- before any process starts ----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["launch", *words])
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-processes", "8"], "--num-processes is 8, one for each GPU, and this machine has none"),
        (["--deepspeed", "zero3_ofload"], "did you mean 'zero3_offload'?"),
        (["--deepspeed", "BAD.json"], "says its stage in 'zero_optimization', which is missing"),
        (["--accelerate", "fsdp"], "those are ddp, "),
        (["--accelerate", "fsdp"], "did you mean 'fsdp2'?"),
        (["--hostfile", "nowhere"], "--hostfile nowhere: no such file"),
        (["--hostfile", "EMPTY"], "a line reads 'worker-1 slots=8'"),
        (["--hostfile", "WRONG"], "bad entry: worker-1 slots=many"),
        (["--hostfile", "HOSTS", "--num-machines", "3"], "--num-machines is 3, but"),
        (["--hostfile", "HOSTS", "--num-processes", "3"], "gives nowhere.invalid slots=2"),
        (["--hostfile", "HOSTS"], "host 'nowhere.invalid' cannot be reached: ssh: Could not resolve hostname"),
        (["--hostfile", "HOSTS", "--rendezvous", "a:1"], "leave out --rendezvous"),
        (["--num-machines", "2"], "with the same --rendezvous HOST:PORT"),
        (["--accelerate", "ddp", "--num-machines", "2"], "leave out --hostfile and --num-machines"),
        (["mixture.sites.0.router.top_k=9"], "router.top_k is 9 but there are 4 experts"),
    ],
)
def test_refused_before_any_process_starts(
    words: list[str],
    message: str,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available() and words[0] == "--num-processes":
        pytest.skip("this machine has GPUs")
    monkeypatch.setattr(subprocess, "Popen", only("ssh"))
    recipe = recipe_file(tmp_path, backbone_folder, use_cpu=words[0] != "--num-processes")
    files = {
        "BAD.json": '{"train_batch_size": 4}',
        "EMPTY": "# nothing yet\n",
        "WRONG": "worker-1 slots=many\n",
        "HOSTS": "nowhere.invalid slots=2\nnowhere-else.invalid slots=2\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    words = [str(tmp_path / word) if word in files else word for word in words]
    assert message in refused(capsys, str(recipe), *words)


def only(name: str) -> Any:
    """Lets one program be started and no other."""
    real = subprocess.Popen

    def start_it(command: Any, *args: Any, **kwargs: Any) -> Any:
        assert command[0] == name, f"{command} was started"
        return real(command, *args, **kwargs)

    return start_it


def test_more_processes_than_gpus(
    backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    recipe = recipe_file(tmp_path, backbone_folder, use_cpu=False)
    assert "this machine has 4: run this where there are 8" in refused(capsys, str(recipe), "--num-processes", "8")


# -- what ships -------------------------------------------------------------------------------------------------------


def test_the_stages_ship() -> None:
    names = ["zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert list(shipped("deepspeed")) == names
    assert find_config("zero2", "deepspeed").name == "zero2.json"


@pytest.mark.parametrize("name", sorted(shipped("deepspeed")))
def test_deepspeed_configurations_are_deepspeeds(name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = json.loads(shipped("deepspeed")[name].read_text())
    known = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    assert {key for key, value in values.items() if value == "auto"} == known
    assert values["bf16"] == values["fp16"] == {"enabled": "auto"}
    assert not {"optimizer", "scheduler"} & set(values), "groups and schedule are ours"
    zero = {key: 10 if value == "auto" else value for key, value in values["zero_optimization"].items()}
    parsed = DeepSpeedZeroConfig(**zero)  # knows no other keys
    assert int(parsed.stage) == int(name[4])
    offload = name.endswith("_offload")
    assert (parsed.offload_optimizer is not None) == offload
    assert (parsed.offload_param is not None) == (name == "zero3_offload")
    # DeepSpeed's own Adam for the CPU would replace the one that the recipe names, and compile for minutes.
    assert (values.get("zero_force_ds_cpu_optimizer") is False) == offload


@pytest.mark.parametrize("name", sorted(shipped("accelerate")))
def test_accelerate_configurations_are_accelerates(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(shipped("accelerate")[name]))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    assert str(config.distributed_type).endswith(kinds[name])


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*/*.s[hb]*")), ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


# -- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(backbone_folder: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same recipe and rows: one process, two by torch's launcher, two by DeepSpeed's with ZeRO-2."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = str(recipe_file(folder, backbone_folder, max_steps=3, save_strategy="no"))
    hostfile = folder / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    ways = {
        "one": ["train", recipe, "trainer.args.per_device_train_batch_size=8"],
        "torch": ["launch", recipe, "--num-processes", "2"],
        "deepspeed": ["launch", recipe, "--hostfile", str(hostfile), "--deepspeed", "zero2"],
    }
    said = {}
    for name, words in ways.items():
        process = start(environment, *words, f"output_dir={folder / name}")
        said[name] = finish(process)
        assert process.returncode == 0, said[name]
    return folder, said


@pytest.mark.parametrize("way", ["torch", "deepspeed"])
def test_two_processes_give_the_numbers_of_one(runs: Any, way: str) -> None:
    folder, said = runs
    logs = {
        name: [
            (line["loss"], line["grad_norm"])
            for line in json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
            if "loss" in line
        ]
        for name in ("one", way)
    }
    assert len(logs["one"]) == 3
    for two, one in zip(logs[way], logs["one"], strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    one, two = (load_file(folder / name / "moelora.safetensors") for name in ("one", way))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert said[way].count("saved to") == 1


def test_a_recipe_of_a_launch_says_its_deepspeed_configuration(runs: Any) -> None:
    folder, _ = runs
    saved = yaml.safe_load((folder / "deepspeed" / "recipe.yaml").read_text())
    assert saved["trainer"]["args"]["deepspeed"] == json.loads(shipped("deepspeed")["zero2"].read_text())


def test_a_mistake_of_every_process_ends_as_one_of_the_user(
    backbone_folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    recipe = recipe_file(tmp_path, backbone_folder)
    process = start(environment, "launch", str(recipe), "--num-processes", "2", "data.path=nowhere.jsonl")
    said = finish(process)
    assert process.returncode == 2, said
    assert "error (rank 1): data.path: nowhere.jsonl: no such file" in " ".join(said.split())


def test_a_killed_process_ends_the_launch_with_one_message(
    backbone_folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    steps = {"max_steps": 100_000, "save_strategy": "steps", "save_steps": 1}
    recipe = recipe_file(tmp_path, backbone_folder, **steps)
    process = start(environment, "launch", str(recipe), "--num-processes", "2")
    try:
        _wait_for(lambda: (tmp_path / "run" / "checkpoint-2").exists(), process)
        workers = {each.environ()["RANK"]: each for each in _workers(process)}
        os.kill(workers["1"].pid, signal.SIGKILL)
        began = time.monotonic()
        said = " ".join(finish(process, 60).split())
    finally:
        process.terminate()
        process.wait(30)
    assert process.returncode == 3, said
    assert time.monotonic() - began < 30
    assert "rank 1 on" in said
    assert "was killed by signal 9 (SIGKILL)" in said
    assert "is whole: give the same command with --resume latest to go on from there" in said
    assert not any(psutil.pid_exists(each.pid) and each.is_running() for each in workers.values())


def _workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [each for each in psutil.Process(process.pid).children(recursive=True) if "RANK" in each.environ()]


def _wait_for(done: Any, process: subprocess.Popen[str], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, finish(process)
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.1)


# -- what ended it ----------------------------------------------------------------------------------------------------


def test_failures_in_words() -> None:
    assert str(Failure("rank 3", "worker-1", 1)) == "rank 3 on worker-1 ended with exit code 1; what it said is above"
    assert "killed by signal 11 (SIGSEGV)" in str(Failure("rank 3", "worker-1", -11))


def test_failures_of_a_hostfile_name_host_and_ranks() -> None:
    hosts = {"a": 2, "b": 1, "c": 4}
    assert _of_deepspeed(hosts, "c", -9) == Failure("one of the ranks 3 to 6", "c", -9)
    assert _of_deepspeed(hosts, "b", 1) == Failure("rank 2", "b", 1)
    assert _of_deepspeed(hosts, None, 1).host == "a"
