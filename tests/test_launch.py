"""The launchers: what each would do, that a dry run does nothing, and what happens when a slice is taken away."""

import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "launch"
COMMON = ["--project=p", "--zone=us-east5-a", "--type=v5p-128"]
WORKDIR = "gs://b/runs/my run"
# launcher -> its own flags
LAUNCHERS = {"tpu_vm.sh": [], "xpk.sh": ["--cluster=c", "--image=r/i:1"], "skypilot.sh": []}
SOURCED = {"common.sh", "vm.sh"}
DEMO = "demo_on_tpu_vm.sh"
FLAGS = ["--config.train.steps=100", "--config.data.sources=/data/my text:0.5"]
TRAIN = (
    "python -m solar_jax.train --take_over --config configs/dus_48l.py --workdir 'gs://b/runs/my run' "
    "--config.train.steps=100 '--config.data.sources=/data/my text:0.5'"
)
# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
SKYPILOT_KEYS = {
    "name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run", "config",
}  # fmt: skip
SKYPILOT_RESOURCES = {
    "infra", "accelerators", "accelerator_args", "cpus", "memory", "instance_type", "use_spot", "disk_size",
    "disk_tier", "network_tier", "max_hourly_cost", "image_id", "ports", "labels", "autostop", "any_of", "ordered",
    "job_recovery",
}  # fmt: skip
# What a launcher may start; in these tests each writes down how it was called.
TOOLS = ("gcloud", "docker", "xpk", "sky", "git", "sleep")


@pytest.fixture
def tools(tmp_path) -> pathlib.Path:
    """A folder of stand-ins for the tools; what they are called with is in `calls` beside it, a line a call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        script = folder / tool
        answer = f"[ ! -f {tmp_path}/answer ] || . {tmp_path}/answer"  # what it says and returns, where a test cares
        script.write_text(f'#!/bin/bash\necho "{tool} ${{*@Q}}" >> {tmp_path}/calls\n{answer}\n')
        script.chmod(0o755)
    return folder


def launch(name: str, *flags: str, tools: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    path = f"{tools}:{os.environ['PATH']}" if tools else os.environ["PATH"]
    return subprocess.run(
        [str(FOLDER / name), *flags], capture_output=True, text=True, check=False, env=os.environ | {"PATH": path},
        cwd="/", timeout=60,
    )  # fmt: skip


def commands(name: str, tools: pathlib.Path) -> list[list[str]]:
    """The commands that a dry run prints, each as a shell takes it apart."""
    flags = [f"--workdir={WORKDIR}", *LAUNCHERS[name], "--spot", "--dry_run"]
    done = launch(name, *COMMON, *flags, "--", *FLAGS, tools=tools)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


def test_every_launcher_is_tried_here():
    assert {f.name for f in FOLDER.glob("*.sh")} - SOURCED == {*LAUNCHERS, DEMO}


@pytest.mark.parametrize("script", sorted(f.name for f in FOLDER.glob("*.sh")))
def test_bash_reads_every_script(script):
    subprocess.run(["bash", "-n", FOLDER / script], check=True)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_dry_run_starts_nothing(tools, name):
    assert commands(name, tools)
    assert not (tools.parent / "calls").exists()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_all_start_the_same_training_command_with_every_flag_whole(tools, name):
    (line,) = [word for command in commands(name, tools) for word in command if "solar_jax.train " in word]
    assert line.endswith(TRAIN)
    words = shlex.split(line[line.index("python -m") :])
    assert words[-2:] == FLAGS
    assert words[words.index("--workdir") + 1] == WORKDIR


@pytest.mark.parametrize("name", LAUNCHERS)
def test_project_zone_slice_and_spot_reach_the_tool(tools, name):
    (create,) = [c for c in commands(name, tools) if "create" in c or "launch" in c]
    line = shlex.join(create)
    if name == "skypilot.sh":
        assert create[:4] == ["env", "GOOGLE_CLOUD_PROJECT=p", "sky", "jobs"]
        assert "--infra gcp/us-east5/us-east5-a --gpus tpu-v5p-128 --use-spot" in line
    else:
        assert "--project p --zone us-east5-a" in line
        assert "--spot" in create
        assert ("--tpu-type v5p-128" if name == "xpk.sh" else "--accelerator-type v5p-128") in line


def test_tpu_vm_installs_and_trains_on_all_hosts_and_gives_the_slice_back(tools):
    found = commands("tpu_vm.sh", tools)
    assert found[0][:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "solar-jax"]
    assert found[0][found[0].index("--runtime-version") + 1] == "v2-alpha-tpuv5"
    on_hosts = [c for c in found if "tpu-vm" in c]
    assert [c[4] for c in on_hosts] == ["scp", "ssh", "ssh"]  # the commit, install, train
    assert all("--worker=all" in c for c in on_hosts)
    assert found[-1][:6] == ["gcloud", "compute", "tpus", "queued-resources", "delete", "solar-jax"]
    for command in on_hosts[1:]:
        script = next(w for w in command if w.startswith("--command=")).removeprefix("--command=")
        subprocess.run(["bash", "-n", "-c", script], check=True)


def test_a_slice_that_is_taken_away_is_asked_for_again_and_the_run_goes_on(tools):
    # States as gcloud tells them: none, being made, active; lost during the run; none again, active.
    (tools.parent / "states").write_text("\nPROVISIONING\nACTIVE\nSUSPENDED\nSUSPENDED\n\nACTIVE\n")
    (tools.parent / "answer").write_text(
        f"""
        cd {tools.parent}
        case "$*" in
          *describe*) head -1 states; sed -i 1d states ;;
          *solar_jax.train*) if [ ! -f lost ]; then touch lost; exit 1; fi ;;
        esac
        """
    )
    done = launch("tpu_vm.sh", *COMMON, "--workdir=gs://b/r", tools=tools)
    assert done.returncode == 0, done.stderr
    calls = (tools.parent / "calls").read_text().splitlines()
    kinds = {"create": "'create'", "delete": "'delete'", "train": "solar_jax.train", "install": "uv pip install"}
    order = [kind for call in calls for kind, word in kinds.items() if word in call]
    assert order == ["create", "install", "train", "delete", "create", "install", "train", "delete"]


def test_a_run_that_fails_on_healthy_machines_is_not_started_for_ever(tools):
    (tools.parent / "answer").write_text(
        'case "$*" in *describe*) echo ACTIVE ;; *solar_jax.train*) exit 1 ;; esac'
    )  # fmt: skip
    done = launch("tpu_vm.sh", *COMMON, "--workdir=gs://b/r", "--attempts=2", tools=tools)
    assert done.returncode == 2
    assert "failed 2 times on healthy machines" in done.stderr
    calls = (tools.parent / "calls").read_text()
    assert calls.count("solar_jax.train") == 2
    assert "delete" not in calls


def test_xpk_restarts_a_run_whose_other_hosts_failed_with_the_lost_one(tools):
    (create,) = [c for c in commands("xpk.sh", tools) if c[0] == "xpk"]
    assert create[1:3] == ["workload", "create"]
    assert "--restart-on-user-code-failure" in create
    assert create[create.index("--max-restarts") + 1] == "20"
    assert "git archive" in shlex.join(next(c for c in commands("xpk.sh", tools) if c[0] == "git"))


def test_the_skypilot_task_has_documented_keys_and_every_env_that_is_used():
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    assert set(task) <= SKYPILOT_KEYS
    assert set(task["resources"]) <= SKYPILOT_RESOURCES
    assert set(task["envs"]) == {"COMMAND"}
    assert task["envs"]["COMMAND"].startswith(
        "python -m solar_jax.train --take_over --config configs/dus_48l.py --workdir gs://"
    )
    assert 'eval "$COMMAND"' in task["run"]
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--project is missing"),
        ([*COMMON], "--workdir is missing"),
        ([*COMMON, "--regoin=x"], "unknown flag --regoin"),
        ([*COMMON, "--workdir"], "--workdir needs a value"),
        ([*COMMON, "--workdir=/data/r", "steps=3"], "unexpected argument 'steps=3'"),
    ],
)
def test_bad_flags_get_one_sentence_and_start_nothing(tools, name, flags, words):
    done = launch(name, *flags, tools=tools)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not (tools.parent / "calls").exists()


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("tpu_vm.sh", ["--workdir=gs://bucket"], "must name a folder in the bucket"),
        ("xpk.sh", ["--workdir=gs://b", "--cluster=c", "--image=i"], "must name a folder in the bucket"),
        ("xpk.sh", ["--workdir=runs/r", "--cluster=c", "--image=i"], "must be gs://BUCKET/PATH or a path in the pods"),
        ("xpk.sh", ["--workdir=/r", "--image=i"], "--cluster is missing"),
        ("skypilot.sh", ["--workdir=/r"], "must be gs://BUCKET/PATH"),
    ],
)
def test_a_folder_that_not_every_host_would_see_is_refused(tools, name, flags, words):
    done = launch(name, *COMMON, *flags, tools=tools)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tools.parent / "calls").exists()


def test_a_slice_whose_software_is_not_known_needs_it_named(tools):
    flags = ["--project=p", "--zone=z", "--type=v9-8", "--workdir=/r", "--dry_run"]
    assert "give --runtime" in launch("tpu_vm.sh", *flags, tools=tools).stderr
    assert "--runtime-version mine" in launch("tpu_vm.sh", *flags, "--runtime=mine", tools=tools).stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_names_every_flag(name):
    text = launch(name, "--help").stdout
    for flag in ("--project", "--zone", "--type", "--workdir", "--config", "--name", "--spot", "--dry_run"):
        assert flag in text


# ---- The demo -------------------------------------------------------------------------------------------------------

STEPS = ("convert", "upscale", "generate", "train", "generate", "seam")


def demo(tools: pathlib.Path, *flags: str) -> subprocess.CompletedProcess:
    return launch(DEMO, "--project=p", "--zone=z", f"--workdir={tools.parent}/results", *flags, tools=tools)


def demo_steps(tools: pathlib.Path, fails: str = "nothing") -> list[str]:
    """The demo's actions, in order, on a VM that is there when it was asked for, where one step may fail."""
    made = tools.parent / "made"
    (tools.parent / "answer").write_text(
        f"""
        case "$*" in
          *"resources create"*) touch {made} ;;
          *describe*) [ ! -f {made} ] || echo ACTIVE ;;
          *"{fails}"*) exit 1 ;;
          *"scp solar-jax-demo:"*) tar -czf {tools.parent}/results/results.tar.gz -C {FOLDER.parent} launch ;;
        esac
        """
    )
    done = demo(tools, "--", "--config.train.steps=90")
    assert (done.returncode == 0) == (fails == "nothing"), done.stderr
    calls = (tools.parent / "calls").read_text().splitlines()
    kinds = {
        "create": "'create'", "delete": "'delete'", "install": "uv pip install", "back": "solar-jax-demo:solar_jax/",
    } | {step: f"solar_jax.{step} " for step in STEPS}  # fmt: skip
    return [kind for call in calls for kind, word in kinds.items() if word in call]


def test_the_demo_runs_its_steps_in_order_brings_the_results_and_deletes_the_vm(tools):
    assert demo_steps(tools) == ["create", "install", *STEPS, "back", "delete"]
    assert (tools.parent / "results" / DEMO).exists()
    train = next(c for c in (tools.parent / "calls").read_text().splitlines() if "solar_jax.train " in c)
    assert "--config.train.steps=90" in train


@pytest.mark.parametrize(("fails", "before"), [("solar_jax.upscale ", 2), ("solar_jax.seam ", 6)])
def test_the_demo_deletes_its_vm_when_a_step_fails(tools, fails, before):
    assert demo_steps(tools, fails) == ["create", "install", *STEPS[:before], "delete"]


@pytest.mark.parametrize("fails", ["uv pip install", "resources create", "solar-jax-demo:solar_jax/results"])
def test_the_demo_deletes_its_vm_when_it_cannot_be_asked_for_installed_or_read(tools, fails):
    (tools.parent / "made").touch()
    (tools.parent / "answer").write_text(
        f"""
        cd {tools.parent}
        case "$*" in
          *"{fails}"*) touch asked; exit 1 ;;
          *describe*) [ ! -f described ] || [ "{fails}" = "resources create" ] || echo ACTIVE; touch described ;;
        esac
        """
    )
    assert demo(tools).returncode != 0
    assert (tools.parent / "asked").exists()
    assert "'delete'" in (tools.parent / "calls").read_text().splitlines()[-1]


def test_the_demo_leaves_a_tpu_alone_that_it_did_not_make(tools):
    (tools.parent / "answer").write_text('case "$*" in *describe*) echo ACTIVE ;; esac')
    done = demo(tools)
    assert done.returncode == 2
    assert "solar-jax-demo exists, and would be deleted" in done.stderr
    assert "'delete'" not in (tools.parent / "calls").read_text()


def test_a_dry_run_of_the_demo_prints_every_command_and_starts_nothing(tools):
    done = demo(tools, "--dry_run")
    assert done.returncode == 0, done.stderr
    found = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert [next((s for s in STEPS if f"solar_jax.{s} " in c[-1]), "") for c in found if "ssh" in c] == [
        "", *STEPS, "",
    ]  # fmt: skip
    for command in (c for c in found if "ssh" in c):
        subprocess.run(["bash", "-n", "-c", command[-1].removeprefix("--command=")], check=True)
    assert "delete" in found[-1]
    assert not (tools.parent / "calls").exists()


def test_commands_that_the_demo_runs_have_the_flags_that_it_gives(tools):
    from tests.test_docs import help_of

    for line in demo(tools, "--dry_run").stdout.splitlines():
        for name, rest in re.findall(r"solar_jax\.(\w+) ([^|]*)", line):
            for flag in re.findall(r"--(config\.[\w.]+|\w+)", rest):
                assert re.search(rf"--{flag}\b|  {flag}=", help_of(name)), f"{name} --{flag}"
