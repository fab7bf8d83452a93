"""Do the tests notice? Seeded mutants of the package and of the C core, each run against the tests that are about it.

    python tests/mutants.py 300 --seed 1 --jobs 2     # prints those that lived, and the share that was caught
    python tests/mutants.py 300 --seed 1 --list       # only says what they are
    python tests/mutants.py 300 --seed 1 --only 17    # that one alone, with what the tests printed

A mutant is one change: a comparison, an operator, a number, a condition, a returned value, an argument or a statement.
It is caught if a test fails, or does not end, and does so again, and passes without it. What lives either changes
nothing that can be seen, or shows what no test holds. It is void if the compiler refuses it.

A mutant may do anything to the processes that it finds. For root each has a process namespace of its own.
"""

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parent.parent
#: Rooms, by the beginning of their path, and the tests that are about them beside those that are named after them.
ABOUT = {
    "kvmstats_fast/abi": "schema stats_file find values captures",
    "kvmstats_fast/errors": "errors schema stats_file memory recordings",
    "kvmstats_fast/_resource": "stats_file leaks interrupted handover",
    "kvmstats_fast/_text": "text cli_stat report plot",
    "kvmstats_fast/_arguments": "errors samples sampler spans measure",
    "kvmstats_fast/stat.py": "schema values captures samples testing",
    "kvmstats_fast/encoding": "schema stats_file captures foreign",
    "kvmstats_fast/schema": "schema stats_file captures seed_lists",
    "kvmstats_fast/image": "schema captures values seed_lists formats",
    "kvmstats_fast/conformance": "conformance",
    "kvmstats_fast/handle": "stats_file leaks watch sched attach",
    "kvmstats_fast/stats_file": "stats_file schema captures leaks",
    "kvmstats_fast/schedstat": "sched time_shares sampler",
    "kvmstats_fast/file_info": "identity vms samples",
    "kvmstats_fast/groups": "samples sampler selection twin",
    "kvmstats_fast/samples": "samples series selection spans vms twin values",
    "kvmstats_fast/answers": "samples vms spans figures histogram",
    "kvmstats_fast/conversions": "formats samples perfetto",
    "kvmstats_fast/series": "series twin samples",
    "kvmstats_fast/changes": "samples twin spans values series histogram",
    "kvmstats_fast/joining": "samples follow recordings recording vms cli_files",
    "kvmstats_fast/selection": "selection samples vms",
    "kvmstats_fast/spans": "spans wall_clock samples recordings",
    "kvmstats_fast/sampling/relay": "relay follow",
    "kvmstats_fast/sampling": "sampler run run_ends measure follow relay flight sched wall_clock memory",
    "kvmstats_fast/top": "top top_screen cli_terminal",
    "kvmstats_fast/vmm/borrow": "borrow attach find",
    "kvmstats_fast/vmm/handover": "handover",
    "kvmstats_fast/vmm/inherited": "handover",
    "kvmstats_fast/vmm/inject": "inject hazard",
    "kvmstats_fast/vmm/machine": "attach borrow find watch vms follow sched",
    "kvmstats_fast/vmm/mark": "watch attach borrow",
    "kvmstats_fast/vmm/threads": "sched attach",
    "kvmstats_fast/vmm/roster": "follow attach",
    "kvmstats_fast/vmm/refusal": "proc attach borrow find",
    "kvmstats_fast/vmm/find": "find follow attach borrow proc watch",
    "kvmstats_fast/vmm/hold": "hold interrupted",
    "kvmstats_fast/vmm/launch": "hold attach interrupted",
    "kvmstats_fast/vmm": "attach borrow find proc watch",
    "kvmstats_fast/analysis": "figures histogram time_shares compare compare_suites recordings report",
    "kvmstats_fast/formats/perfetto": "perfetto",
    "kvmstats_fast/formats/_put": "put recording",
    "kvmstats_fast/formats/csv": "formats cli_files",
    "kvmstats_fast/formats": "recording recorder recordings formats foreign load_some loading put tail",
    "csrc/layout": "c_core schema stats_file captures",
    "csrc/kvmstats": "c_core schema stats_file captures",
    "csrc/schedstat": "c_core sched",
    "csrc/sweep": "c_core sampler stats_file",
    "csrc/read": "c_core sampler stats_file run",
    "csrc/series": "c_core series twin samples",
    "csrc/inject": "inject",
    "csrc/hold": "hold",
    "csrc/process": "c_core proc borrow",
    "csrc/rename": "put recording",
    "csrc": "c_core run run_ends sampler",
}
#: What no test of the package's own behaviour holds: how it looks, and rooms that stand outside the core.
NOT = ("cli/", "plugins/", "testing/", "export/", "plot.py", "__main__.py", "_kvmstats.py")
#: Its own processes and mounts; what is left of them ends with it. If it eats up the memory, the kernel kills it first.
#: The shell is process 1, which signals do not end as they end others.
APART = (
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "choom", "-n", "1000", "--"),
    *("sh", "-c", '"$@"; exit $?', "sh"),
)
PATIENCE = 60  # seconds for one test


def tests_about(file):
    """Return the tests that are about the room of a file."""
    prefix = max((one for one in ABOUT if file.startswith(one)), key=len, default="")
    names = [Path(file).stem.lstrip("_"), *ABOUT.get(prefix, "").split()]
    paths = [f"tests/test_{name}.py" for name in dict.fromkeys(names)]
    return [path for path in paths if (ROOT / path).exists()]


@dataclass(frozen=True)
class Mutant:
    """One change of one file: bytes [begin, end) become `text`."""

    path: str
    line: int
    begin: int
    end: int
    text: str
    what: str

    def apply(self, tree):
        """Write it into a copy of the tree; return the bytes of the file without it."""
        raw = (tree / self.path).read_bytes()
        (tree / self.path).write_bytes(raw[: self.begin] + self.text.encode() + raw[self.end :])
        return raw

    def __str__(self):
        """Where it is, and what."""
        return f"{self.path}:{self.line}: {self.what}"


# ---- of Python

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "//", ast.FloorDiv: "*", ast.Div: "*", ast.Mod: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip


class PythonMutants(ast.NodeVisitor):
    """Collects the mutants of a file."""

    def __init__(self, path):
        self.path = path
        self.source = (ROOT / path).read_bytes()
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found = []
        self.visit(ast.parse(self.source))

    def at(self, line, column):
        """Return the byte."""
        return self.starts[line - 1] + column

    def span(self, node):
        """Return the bytes of a node."""
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def text(self, node):
        """Return the source of a node."""
        begin, end = self.span(node)
        return self.source[begin:end].decode()

    def add(self, node, text, what):
        """Add a mutant that has `text` in place of the node."""
        self.found.append(Mutant(self.path, node.lineno, *self.span(node), text, what))

    def visit(self, node):
        """Skip what is not executed: annotations, docstrings, blocks for type checkers."""
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        super().visit(node)

    def visit_FunctionDef(self, node):
        """Visit the body and the defaults."""
        if any(ast.unparse(one).endswith("overload") for one in node.decorator_list):
            return
        for one in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(one)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - ast finds it by this name

    def visit_AnnAssign(self, node):
        """Visit the value."""
        if node.value is not None:
            self.visit(node.value)

    def between(self, left, right, old, new, what):
        """Change an operator that stands between two nodes."""
        begin, end = self.span(left)[1], self.span(right)[0]
        found = re.search(rb"(?<![\w<>=!])" + re.escape(old.encode()) + rb"(?![\w<>=])", self.source[begin:end])
        if found:
            place = begin + found.start(), begin + found.end()
            self.found.append(Mutant(self.path, left.end_lineno, *place, new, what))

    def visit_Compare(self, node):
        """Change what is asked."""
        sides = [node.left, *node.comparators]
        for left, operator, right in zip(sides, node.ops, sides[1:], strict=False):
            old = ast.unparse(ast.Compare(ast.Name("a"), [operator], [ast.Name("b")]))[2:-2]
            new = COMPARISONS[type(operator)]
            self.between(left, right, old, new, f"`{old}` is `{new}`")
        self.generic_visit(node)

    def visit_BinOp(self, node):
        """Change the operator."""
        is_text = any(
            isinstance(one, (ast.JoinedStr, ast.Constant)) and not isinstance(getattr(one, "value", 0), int)
            for one in (node.left, node.right)
        )
        if type(node.op) in OPERATORS and not is_text:
            old = ast.unparse(ast.BinOp(ast.Name("a"), node.op, ast.Name("b")))[2:-2]
            new = OPERATORS[type(node.op)]
            self.between(node.left, node.right, old, new, f"`{old}` is `{new}`")
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        """Have `and` be `or`, and the other way round."""
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, old, new, f"`{old}` is `{new}`")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        """Leave out `not` and `-`."""
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.add(
                node, f"({self.text(node.operand)})", f"without `{'not' if isinstance(node.op, ast.Not) else '-'}`"
            )
        self.generic_visit(node)

    def visit_Constant(self, node):
        """Change numbers and truth."""
        if isinstance(node.value, bool):
            self.add(node, str(not node.value), f"{node.value} is {not node.value}")
        elif isinstance(node.value, int):
            self.add(node, f"({node.value} + 1)", f"{self.text(node)} is one more")

    def visit_JoinedStr(self, node):
        """Leave texts as they are."""

    def visit_If(self, node):
        """Turn the condition round, or have it never hold."""
        self.add(node.test, f"not ({self.text(node.test)})", "the condition is turned round")
        self.generic_visit(node)

    def visit_IfExp(self, node):
        """Turn the condition round."""
        self.add(node.test, f"(not ({self.text(node.test)}))", "the condition is turned round")
        self.generic_visit(node)

    def visit_Return(self, node):
        """Return nothing."""
        if node.value is not None and not isinstance(node.value, ast.Constant):
            self.add(node, "return None", "None is returned")
        self.generic_visit(node)

    def visit_Expr(self, node):
        """Leave out a call."""
        if isinstance(node.value, ast.Call):
            self.add(node, "pass", f"without `{self.text(node)[:60]}`")
            self.generic_visit(node)
        elif not isinstance(node.value, ast.Constant):
            self.generic_visit(node)

    def visit_Raise(self, node):
        """Raise nothing; the texts are left as they are."""
        self.add(node, "pass", f"without `{self.text(node).splitlines()[0][:60]}`")

    def visit_Assign(self, node):
        """Visit the value, but of names that only say what there is."""
        if not any(isinstance(one, ast.Name) and one.id in ("__all__", "__slots__") for one in node.targets):
            self.generic_visit(node)

    def visit_Call(self, node):
        """Leave out an argument that has a name."""
        for one in node.keywords:
            if one.arg is not None:
                begin, end = self.span(one)
                comma = re.match(rb"\s*,\s*", self.source[end : self.span(node)[1]])
                end += comma.end() if comma else 0
                self.found.append(Mutant(self.path, one.lineno, begin, end, "", f"without `{self.text(one)[:60]}`"))
        self.generic_visit(node)


# ---- of C

C_TOKENS = (
    (
        re.compile(r"(?<![<>=!+\-*/&|-])(<=|>=|==|!=|<|>)(?![<>=])"),
        {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="},
    ),
    (re.compile(r"(&&|\|\|)"), {"&&": "||", "||": "&&"}),
    (re.compile(r"(?<=\w|\)|\]) ([-+*/%]) (?=\w|\()"), {"+": "-", "-": "+", "*": "+", "/": "*", "%": "/"}),
    (re.compile(r"(?<![\w.\"'])(\d+)(?![\w.\"'])"), None),
    (re.compile(r"(?<=\()(!)(?=\w)"), {"!": ""}),
)  # fmt: skip
C_STATEMENT = re.compile(
    r"^( +)((?!return|break|continue|goto|case|default|static|struct|const|else|for|do\b)[^\s;{}][^;{}]*;)$"
)


def c_mutants(path):
    """Return the mutants of a C file: of its code, but not of comments, texts, declarations and directives."""
    source = (ROOT / path).read_text(encoding="ascii")
    blank = re.sub(
        r"/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])'",
        lambda found: re.sub(r"[^\n]", " ", found[0]),
        source,
        flags=re.DOTALL,
    )
    found, at = [], 0
    inside = False
    for number, line in enumerate(blank.splitlines(keepends=True), 1):
        bare = line.rstrip("\n")
        if bare == "{":
            inside = True
        elif bare == "}":
            inside = False
        if inside and not bare.lstrip().startswith("#") and not bare.endswith("\\"):
            for pattern, becomes in C_TOKENS:
                for token in pattern.finditer(bare):
                    old = token[1]
                    new = f"({old} + 1)" if becomes is None else becomes[old]
                    begin = at + token.start(1)
                    found.append(Mutant(path, number, begin, begin + len(old), new, f"`{old}` is `{new}`"))
            if statement := C_STATEMENT.match(bare):
                begin = at + len(statement[1])
                found.append(Mutant(path, number, begin, at + len(bare), ";", f"without `{statement[2][:60]}`"))
        at += len(line)
    return found


def every_mutant():
    """Return all of them, by file."""
    names = subprocess.run(
        ("git", "ls-files", "kvmstats_fast", "csrc"), cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = {}
    for path in names.stdout.split():
        if path.endswith(".py") and not path.removeprefix("kvmstats_fast/").startswith(NOT):
            files[path] = PythonMutants(path).found
        elif path.endswith((".c", ".h")):
            files[path] = c_mutants(path)
    return files


def choose(count, seed):
    """Draw mutants, each line as likely as any other that has one; no line twice."""
    lines = {}
    for mutants in every_mutant().values():
        for mutant in mutants:
            lines.setdefault((mutant.path, mutant.line), []).append(mutant)
    rng = random.Random(seed)
    return [rng.choice(lines[where]) for where in rng.sample(sorted(lines), min(count, len(lines)))]


# ---- running the tests


def make_tree(folder):
    """Copy what git knows, and what was built."""
    names = subprocess.run(("git", "ls-files", "-z"), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in (*names.split("\0"), *(str(one.relative_to(ROOT)) for one in ROOT.glob("kvmstats_fast/*.so"))):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(tree):
    """Build the extension of a tree; return whether the compiler takes it, without a warning."""
    # Without the pages of a wheel, for which the package would be imported.
    code = "import build_ffi, setuptools; build_ffi.build._add_pages = lambda _: None; setuptools.setup()"
    environment = {**os.environ, "KVMSTATS_WERROR": "1"}
    done = subprocess.run(
        (sys.executable, "-c", code, "-q", "build"), cwd=tree, env=environment, capture_output=True, check=False
    )
    if done.returncode == 0:
        for library in tree.glob("build/lib*/kvmstats_fast/*.so"):
            shutil.copy2(library, tree / "kvmstats_fast")
    return done.returncode == 0


@cache
def apart():
    """Return what runs a command apart from the machine's processes: nothing, where that is not permitted."""
    may = os.geteuid() == 0 and subprocess.run((*APART, "true"), capture_output=True, check=False).returncode == 0
    return APART if may else ()


def run_tests(tree, tests, patience, left_out=()):
    """Run tests until one fails; return how that ended, the tests that did not pass, and what was printed."""
    command = (
        *(*apart(), sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "-p", "no:randomly"),
        *("-W", "ignore", "-o", "testpaths=tests", *tests),
        *(f"--deselect={one}" for one in left_out),
    )
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}
    with (
        tempfile.TemporaryFile("w+", errors="replace") as printed,
        subprocess.Popen(
            command, cwd=tree, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        size, since, is_over = 0, time.monotonic(), False
        while process.poll() is None and not is_over:
            time.sleep(0.1)
            if size != (size := os.fstat(printed.fileno()).st_size):
                since = time.monotonic()
            is_over = time.monotonic() - since > patience
        with suppress(ProcessLookupError):  # what the tests started, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        printed.seek(0)
        output = printed.read()
    if process.returncode in (0, 5):  # 5: all of them are left out
        return "lived", [], output
    if is_over:  # the last line is the test that was begun
        return "caught, does not end", re.findall(r"^(tests/[^[\s]+)", output, re.MULTILINE)[-1:], output
    # Without its parameters, which a mutant may have made up.
    failed = re.findall(r"^(?:FAILED|ERROR) ([^[\n]+?)(?:\[.*| - .*)?$", output, re.MULTILINE)
    return f"caught, status {process.returncode}", failed, output


@contextmanager
def in_place(mutant, tree):
    """Have a mutant in a copy of the tree; give whether it compiles."""
    is_c = mutant.path.startswith("csrc")
    built = {path: path.read_bytes() for path in tree.glob("kvmstats_fast/*.so")} if is_c else {}
    raw = mutant.apply(tree)
    try:
        yield not is_c or build(tree)
    finally:
        (tree / mutant.path).write_bytes(raw)
        for path, library in built.items():
            path.unlink()  # what is mapped stays as it was
            path.write_bytes(library)


def judge(mutant, tree, patience):
    """Return what became of a mutant, and what the tests printed."""
    tests, left_out = tests_about(mutant.path), []
    if not tests:
        return "lived: there are no tests of it", ""
    while True:
        with in_place(mutant, tree) as compiles:
            if not compiles:
                return "void, it does not compile", ""
            # Mostly the first file has it; collecting the others takes its time.
            for some in filter(None, (tests[:1], tests[1:])):
                verdict, failed, output = run_tests(tree, some, patience, left_out)
                if verdict != "lived":
                    break
            else:
                break
            # Without a name the package could not be imported, or was ended.
            fails_again = run_tests(tree, failed or tests, patience)[0] != "lived"
        # Status 4: the mutant had made the test up.
        without = run_tests(tree, failed or tests, patience)[0]
        if fails_again and without in ("lived", "caught, status 4"):
            break
        if not failed or failed[0] in left_out:
            verdict = "unsure"
            break
        left_out += failed
    notes = [*failed, *(f"({one} fails without it, or not again)" for one in left_out)]
    return ": ".join(filter(None, (verdict, " ".join(notes)))), output


def main():
    """Run as the first lines say."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("count", type=int)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--first", type=int, default=0, help="leave out so many")
    options.add_argument("--list", action="store_true")
    options.add_argument("--only", type=int, nargs="+")
    options.add_argument("--patience", type=float, default=PATIENCE, help="seconds for one test")
    given = options.parse_args()
    mutants = list(enumerate(choose(given.count, given.seed)))[given.first :]
    if given.only is not None:
        mutants = [one for one in mutants if one[0] in given.only]
    if given.list:
        for number, mutant in mutants:
            print(number, mutant)
        return
    if not apart():
        print("not root: the tests see, and may harm, this machine's processes")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        Path(folder).chmod(0o755)  # some tests become another user
        trees = Queue()
        for number in range(given.jobs):
            trees.put(make_tree(Path(folder) / f"tree{number}"))

        def work(number, mutant):
            tree, start = trees.get(), time.monotonic()
            try:
                verdict, output = judge(mutant, tree, given.patience)
            finally:
                trees.put(tree)
            print(f"{number:4} {time.monotonic() - start:4.0f} s  {mutant}: {verdict}", flush=True)
            if given.only is not None:
                print(output)
            return verdict

        verdicts = Counter(re.split("[,:]", one)[0] for one in pool.map(lambda one: work(*one), mutants))
    print(f"{sum(verdicts.values())} mutants of seed {given.seed}: {dict(verdicts)}")


if __name__ == "__main__":
    main()
