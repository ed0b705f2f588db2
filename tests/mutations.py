"""Plants mistakes in ref/ and looks whether the claims' tests see them: `python tests/mutations.py [P09 ...]`.

Run on demand; pytest does not collect it. Each mutation replaces one text, which must occur exactly once in its
module, in a temporary copy of ref/ and tests/, and names the claims whose tests must fail then; "P13:state" narrows
a claim to the tests with that word in their names (pytest's -k). A module is given by its name and may lie in any
folder of ref/. First all claims must hold without a mutation. Prints a table and exits 1 if a mistake stays unseen, or
a text is not found exactly once. With arguments only the mutations of these claims run. Four minutes on a free core.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import scipy.integrate  # noqa: F401  for the forks, as are the next ones
import scipy.optimize  # noqa: F401
import scipy.stats  # noqa: F401
import sympy  # noqa: F401
import torch

torch.set_num_threads(1)
phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # a failing example need not be made small
hypothesis.settings.register_profile("mutations", derandomize=True, phases=phases)
sys.dont_write_bytecode = True  # a mutated module has its old size and time, perhaps

ROOT = Path(__file__).parents[1]

# module, old text, new text, claims that must turn red
MUTATIONS = [
    ("entropy", "schedule.std.double().square())", "schedule.std.double())", "P01 P02"),
    ("entropy", "entropy = dim / 2 - log_normalizer", "entropy = dim - log_normalizer", "P01 P02 P03 P13"),
    ("entropy", "[list(schedule.steps)].sum()", "[list(schedule.steps)[1:]].sum()", "P02"),
    ("entropy", "psi[0] - psi[1] + log_volume", "psi[0] + log_volume", "P02:knn"),
    ("entropy", "((mean - other) / std).square() / 2", "((mean - other) / std).square()", "P05"),
    ("policy", "math.log(2 * math.pi)) - std.log()", "math.log(2 * math.pi))", "P01 P13:learned P13:state"),
    ("policy", "-0.5 * (z.square()", "-1.0 * (z.square()", "P01 P02 P03:covariance P05 P10 P13:anisotropic"),
    ("policy", "z = (x - mean) / std", "z = (x - mean) / std**0.5", "P01 P03:covariance P10 P13:state"),
    ("policy", "mean + schedule.std[i] * eps", "mean + schedule.std[i] ** 2 * eps", "P02 P03 P04:monte P13:state"),
    ("policy", "schedule.std[i], reduction))", 'schedule.std[i], "mean"))', "P01:monte P02:library P03:covariance P05:monte"),
    ("schedule", "a.append(1 - g**2 / (2 * s) * dt)", "a.append(1 - g**2 / s * dt)", "P04"),
    ("schedule", "std.append(g * math.sqrt(dt))", "std.append(g * dt)", "P04 P05"),
    ("schedule", "s if s < 1 else sigma[1]", "s if s < 1 else 0.0", "P04:singularity"),
    ("schedule", "noise = math.sqrt(s_next**2 - std[i] ** 2)", "noise = s_next", "P04:cps P04:table"),
    ("schedule", "b.append(-(1 + g**2 * (1 - s) / (2 * s)) * dt)", "b.append(-dt)", "P04:weak P05"),
    ("mixture", "return (-centre + (t -", "return (centre + (t -", "P04"),
    ("mixture", "(p0.log() + tau * reward)", "(p0.log() - tau * reward)", "P06"),
    ("mixture", "entr(probability).sum(-1).exp()", "entr(probability).sum(-1)", "P06"),
    ("mixture", "nn.init.zeros_(self.residual[-1].weight)", "nn.init.ones_(self.residual[-1].weight)", "P06"),
    ("mixture", "return 2 * reward_gap * bandwidth**2", "return reward_gap * bandwidth**2", "P06 P11"),
    ("two_modes", "group_size / (group_size - 2)", "group_size / (group_size - 1)", "P11:large P11:threshold"),
    ("two_modes", "(1 - 2 * j / group_size)", "(1 - j / group_size)", "P11"),
    ("two_modes", "* g * q * (1 - q) * w", "* g * q * w", "P06:minority P11:enumerating P11:finite"),
    ("two_modes", "q * (1 - q) * K / (K - 1)) + 1e-4", "q * (1 - q)) + 1e-4", "P06:minority P11:enumerating"),
    ("perceptual", "(K / (K - 1) if leave_one_out else 1)", "((K - 1) / K if leave_one_out else 1)", "P09"),
    ("perceptual", "-squared / (2 * bandwidth**2) -", "-squared / bandwidth**2 -", "P08 P09 P11"),
    ("perceptual", "-squared / (2 * bandwidth**2) - D / 2", "-squared / (2 * bandwidth**2) - D", "P08"),
    ("perceptual", "math.log(K - 1) - D / 2", "math.log(K) - D / 2", "P12:scipy P12:counts"),
    ("perceptual", "device=phi.device), -torch.inf)", "device=phi.device), 0.0)", "P12:counts P12:threshold"),
    ("perceptual", "deviations(phi).square().mean().item()", "deviations(phi).square().sum(-1).mean().item()", "P08 P12"),
    ("methods", "shape(group) - self.weight * group.omega * group.log_prob", "shape(group) + self.weight * group.omega * group.log_prob", "P09 P10 P11 P12:few P12:softmax P12:threshold"),  # PEC
    ("methods", 'kernel_log_prob(self.features, own, "mean") * (own / self.bandwidth) ** 2', 'perceptual_log_prob(self.features, self.bandwidth, "mean")', "P12:softmax P12:threshold"),
    ("methods", 'self.bandwidth, "mean")', 'self.bandwidth, "sum")', "P09 P10 P11:trained"),
    ("methods", "group.log_prob(self.space) - group.policy_log_prob", "group.log_prob(self.space) + 7 * group.policy_log_prob", "P10:quadrature P10:signs"),  # PCVAE
    ("methods", "group.log_prob(self.space) - group.policy_log_prob", "group.log_prob(self.space)", "P10:quadrature"),
    ("methods", "loss(step) - self.weight * step.log_prob.mean()", "loss(step) + self.weight * step.log_prob.mean()", "P10:later P10:methods"),  # naive KL
    ("grpo", "centred = reward - reward.mean(1, keepdim=True)", "centred = reward", "P03 P09 P11 P12:few"),
    ("grpo", "(reward.std(1, keepdim=True) + 1e-4)", "(reward.std(1, keepdim=True) ** 0.5 + 1e-4)", "P03:normalised P03:survive P07 P11:enumerating"),
    ("grpo", "(reward.std(1, keepdim=True) + 1e-4)", "(reward.std(1, keepdim=True) + 1e-1)", "P07 P11:enumerating"),
    ("grpo", ".clamp(-clip, clip)", ".clamp(0, clip)", "P03 P09 P11"),
    ("mixture", "weights / weights.sum() @ replicator(p0, reward, torch.as_tensor(tau, dtype=p0.dtype)[..., None])", "replicator(weights / weights.sum() @ p0, reward, torch.as_tensor(tau, dtype=p0.dtype))", "P16"),
    ("mixture", "weights / weights.sum() @ replicator", "torch.ones(len(p0)).to(p0) / len(p0) @ replicator", "P16"),
    ("entropy", "return policy_entropy(schedule, dim)[schedule.steps[-1]]", "return policy_entropy(schedule, dim)[schedule.steps[0]]", "P17"),
    ("schedule", "slope[i], i) ** 2 * V[i] / V[i + 1]).item())", "slope[i], i) ** 2).item())", "P18"),
    ("schedule", "slope = (sigma - (1 - sigma) * data_std**2) / V", "slope = (sigma - (1 - sigma) * data_std) / V", "P18"),
    ("schedule", "(schedule.std[i].double() ** 2 / V[i + 1])", "(schedule.std[i].double() ** 2 / V[i])", "P18"),
    ("presets", 'kind="dance_sde", noise_level=0.3', 'kind="dance_sde", noise_level=1.3', "P18"),
    ("constraint", "* group_size / (group_size - 2)\n", "* group_size / (group_size - 1)\n", "P19"),
    ("constraint", "weight = 2 * reward_gap * bandwidth**2", "weight = reward_gap * bandwidth**2", "P19"),
    ("constraint", "u = math.sqrt(1 - target / most)", "u = 1 - target / most", "P19"),
    ("constraint", "speed * (1 - u**2) / (4 * u)", "speed * (1 - u**2) / (2 * u)", "P19"),
    ("constraint", "proportional * unit / 2", "proportional * unit", "P19"),
    ("constraint", "max(0.0, weight + integral * lacking)", "max(0.0, weight - integral * lacking)", "P19"),
    ("constraint", "proportional * (target - kept)", "proportional * (target - share)", "P19:gains"),
    ("constraint", "math.sqrt(1 - min(target, 0.9))", "(1 - min(target, 0.9))", "P19:gains"),
    ("grpo", "state.weight = estimate(target, state.unit, settings.group_size)", "state.weight = 0.0", "P19:starts"),
    ("constraint", "return weight, max(0.0, weight + proportional * lacking)", "return weight, weight + proportional * lacking", "P19"),
    ("constraint", "lacking = (target - share) * reward_std", "lacking = target - share", "P19"),
    ("constraint", "(1 if 2 * j <= K else -1)", "(1 if 2 * j < K else -1)", "P19:gains"),
    ("constraint", "math.sqrt(j * (K - j))", "j * (K - j)", "P19:gains"),
    ("constraint", "or share > target - 0.02:", ":", "P19:out_of_reach"),
    ("constraint", "weight <= 3 * estimate", "weight <= estimate", "P19:out_of_reach"),
    ("constraint", "weight <= 3 * estimate", "weight <= 30 * estimate", "P19:out_of_reach"),
    ("grpo", "state.kept, target, state.unit)\n            if", "state.kept, target, 1.0)\n            if", "P19:paid"),
    ("grpo", "diversity(group), state.kept, target", "diversity(group), diversity(group), target", "P19:paid"),
    ("grpo", "unmet and (unmet := out", "False and (unmet := out", "P19:said_during"),
    ("grpo", "return state.kept < (", "return state.metrics.get('diversity', 1) < (", "P19:collapse"),
    ("state", '"kept": self.kept,', '"kept": 1.0,', "P19:collapse"),
    ("state", '"multiplier": (self.weight, self.unit)', '"multiplier": (0.0, self.unit)', "P19:resumed"),
    ("state", '"places": self.places,', '"places": None,', "P19:resumed"),
    ("constraint", 'final["feature_variance"] / base["feature_variance"]', 'final["feature_variance"]', "P19:reported"),
    ("two_modes", "math.expm1(-exponent) / (group_size - 1))", "math.expm1(-exponent) / group_size)", "P14"),
    ("two_modes", "own + other * math.exp(-exponent)", "own + other * math.exp(exponent)", "P14"),
    ("many_modes", "excess[size - 1] / size", "excess[size - 1] / (size + 1)", "P15"),
    ("many_modes", "curvature = weight / bandwidth**2 * (group_size - 2)", "curvature = weight / bandwidth**2 * (group_size - 1)", "P15"),
    ("many_modes", "shaped = reward + weight * bonus(", "shaped = reward - weight * bonus(", "P15"),
    ("many_modes", "factor = group_size / (group_size - 2) if", "factor = group_size / (group_size - 1) if", "P15"),
    ("many_modes", "(1 - alike).log() - feature_distance**2 / (2 * bandwidth**2)", "(1 - alike).log() - feature_distance**2 / bandwidth**2", "P15"),
]  # fmt: skip


def module(root: Path, name: str) -> Path:
    found = list((root / "ref").rglob(f"{name}.py"))
    if len(found) != 1:
        raise SystemExit(f"{len(found)} modules of ref/ are called {name}.py")
    return found[0]


def red(root: Path, test: str) -> bool:
    """Whether a claim's tests run and fail (pytest's exit status 1; an import that fails does not count).

    They run in a fork of this process, which has imported the large libraries but nothing of ref/.
    """
    claim, _, word = test.partition(":")
    files = [str(path) for path in (root / "tests").rglob("test_*.py") if f'claim("{claim}")' in path.read_text()]
    options = ["-n", "0", "-x", "-q", "--tb=no", "--hypothesis-profile=mutations", "-m", claim]
    options += ["-k", word] if word else []
    child = os.fork()
    if child == 0:
        os.chdir(root)
        sys.path.insert(0, str(root))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(pytest.main([*options, *files]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def main(claims: list[str]) -> int:
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("ref", "tests", "proofs"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        for claim in sorted({test[:3] for *_, tests in MUTATIONS for test in tests.split()}):
            if (not claims or claim in claims) and red(root, claim):
                raise SystemExit(f"{claim} fails without any mutation: nothing can be learned from the others")
        print(f"{'module':<11} {'old text':<62} tests that must fail")
        for name, old, new, tests in MUTATIONS:
            wanted = [test for test in tests.split() if not claims or test[:3] in claims]
            if not wanted:
                continue
            path = module(root, name)
            text = path.read_text()
            if text.count(old) == 1:
                path.write_text(text.replace(old, new))
                verdicts = [f"{test} {'red' if red(root, test) else 'STAYS GREEN'}" for test in wanted]
                path.write_text(text)
            else:
                verdicts = [f"TEXT FOUND {text.count(old)} TIMES"]
            wrong += sum(not verdict.endswith("red") for verdict in verdicts)
            print(f"{name:<11} {old[:60]:<62} {', '.join(verdicts)}", flush=True)
    print(f"{wrong} wrong" if wrong else "every planted mistake is seen")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
