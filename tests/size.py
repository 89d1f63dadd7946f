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
NODES = 17_500  # of the syntax trees of all scripts, operators and contexts left out
NODES_A_LINE, LINES_A_COMMENT, LINES_A_FUNCTION, LINES_OF_MAIN, DEPTH = 8, 8, 80, 220, 4
LINES = {"README.md": 260, "slurm_submit.sh": 80, "tests/*.py": 4000}
UNCOUNTED = ast.expr_context, ast.operator, ast.cmpop, ast.boolop, ast.unaryop
BLOCKS = ast.If, ast.For, ast.While, ast.With, ast.Try
LAYOUT = tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER


def depth(node, above: int = 0) -> int:
    """The deepest nesting of blocks below a node."""
    inner = [depth(child, above + isinstance(child, BLOCKS)) for child in ast.iter_child_nodes(node)]
    return max([above, *inner])


def main() -> None:
    wrong, total = [], 0
    for name in SCRIPTS:
        text = (ROOT / name).read_text()
        tree = ast.parse(text)
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        code = {t.start[0] for t in tokens if t.type not in (*LAYOUT, tokenize.COMMENT)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            most = LINES_OF_MAIN if name == "train.py" else LINES_A_FUNCTION
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= most:
                wrong.append(f"{name}: {node.name} is too long")
        nodes = sum(not isinstance(node, UNCOUNTED) for node in ast.walk(tree))
        comments = sum(t.type == tokenize.COMMENT for t in tokens)
        print(f"{name:16} {len(code):5} code lines {comments:5} comments {nodes:6} nodes")
        if nodes / len(code) > NODES_A_LINE or comments * LINES_A_COMMENT < len(code) or depth(tree) > DEPTH:
            wrong.append(f"{name} is too dense, has too few comments, or is nested too deep")
        total += nodes
    print(f"all scripts: {total} nodes")
    if total > NODES:
        wrong.append(f"{total} nodes are more than {NODES}")
    for pattern, most in LINES.items():
        lines = sum(path.read_text().count("\n") for path in ROOT.glob(pattern))
        if lines > most:
            wrong.append(f"{pattern} has {lines} lines, more than {most}")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
