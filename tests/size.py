"""Print the size and shape of the scripts; exit 1 above a budget: python tests/size.py

Whoever adds a feature deletes something, or raises a number here and gives the reason in the commit.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = "models.py", "prepare_data.py", "train.py", "run_info.py", "convert.py"
NODES = 19_350  # of the syntax trees of all scripts, operators and contexts left out. The design's goal is 17,500
NODES_A_LINE, LINES_A_COMMENT, LINES_A_FUNCTION, LINES_OF_MAIN, DEPTH = 8, 8, 80, 220, 4
LINES = {"README.md": 260, "slurm_submit.sh": 80, "tests/*.py": 4000}
UNCOUNTED = ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop
BLOCKS = ast.If, ast.For, ast.While, ast.With, ast.Try
LAYOUT = tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER


def depth(node, above: int = 0) -> int:
    """The deepest nesting of blocks below a node."""
    inner = [depth(child, above + isinstance(child, BLOCKS)) for child in ast.iter_child_nodes(node)]
    return max([above, *inner])


def measure(path: Path) -> dict:
    text = path.read_text()
    tree = ast.parse(text)
    docstrings, functions = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node.end_lineno - node.lineno + 1
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    code = {t.start[0] for t in tokens if t.type not in (*LAYOUT, tokenize.COMMENT)} - docstrings
    return {
        "lines": text.count("\n"),
        "code": len(code),
        "comments": sum(t.type == tokenize.COMMENT for t in tokens),
        "nodes": sum(not isinstance(node, UNCOUNTED) for node in ast.walk(tree)),
        "functions": functions,
        "depth": depth(tree),
    }


def main() -> None:
    wrong, total = [], 0
    for name in SCRIPTS:
        m = measure(ROOT / name)
        total += m["nodes"]
        longest = max(m["functions"], key=m["functions"].get)
        density = m["nodes"] / m["code"]
        print(f"{name:16} {m['lines']:5} lines {m['nodes']:6} nodes {density:4.1f} a line, longest {longest}")
        for function, lines in m["functions"].items():
            if lines > (LINES_OF_MAIN if (name, function) == ("train.py", "main") else LINES_A_FUNCTION):
                wrong.append(f"{name}: {function} has {lines} lines")
        if density > NODES_A_LINE or m["comments"] * LINES_A_COMMENT < m["code"] or m["depth"] > DEPTH:
            wrong.append(f"{name}: {density:.1f} nodes a line, {m['comments']} comments, nesting {m['depth']}")
    print(f"{'all scripts':28} {total:6} nodes")
    sizes = {pattern: sum(p.read_text().count("\n") for p in ROOT.glob(pattern)) for pattern in LINES}
    print(", ".join(f"{pattern} {lines} lines" for pattern, lines in sizes.items()))
    wrong += [f"{pattern} has {lines} lines" for pattern, lines in sizes.items() if lines > LINES[pattern]]
    if total > NODES:
        wrong.append(f"the scripts have {total} nodes")
    if wrong:
        sys.exit("above the budget: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
