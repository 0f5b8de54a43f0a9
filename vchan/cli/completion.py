"""Scripts that make shells complete vchan's words, made from the parser.

What kind of word an argument takes is in its metavar: VM, FILE, DIR, KIND; or it has choices.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from vchan.cli.parser import commands_of, subcommands, walk

KINDS: Final = ("listen", "reply", "cast", "fanout", "call", "notify", "http", "report", "forward")
"""Kinds of requests, as the policy has them."""
WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "KIND": KINDS,
    "VERDICT": ("allow", "deny", "conductor", "refused", "quarantine"),
}
"""What may stand where an argument has this metavar."""
FILES: Final = frozenset({"FILE", "PATH", "SOURCE", "DESTINATION"})
VMS: Final = "-f value -c name list"
"""What prints the names of a host's VMs, one a line."""
DAEMON: Final = "--socket"
"""The option that says which daemon is asked, for them too. Of its value, as it was typed, the
shells' scripts take quotes, and a home directory for ~: nothing that is typed is run."""


class Argument(NamedTuple):
    """An option, or an operand.

    Attributes:
        names: Of an option; an operand has none.
        value: The metavar of its value; "" if it takes none.
        words: What the value may be; () if that cannot be listed.
        repeats: An operand that takes all words that follow.
    """

    names: tuple[str, ...]
    value: str
    words: tuple[str, ...]
    help: str
    repeats: bool = False


class Command(NamedTuple):
    """A command, by the words that lead to it."""

    path: str
    options: list[Argument]
    operands: list[Argument]
    below: dict[str, str]


def commands(parser: argparse.ArgumentParser) -> list[Command]:
    """All commands, the whole one first."""
    words = {**WORDS, "COMMAND": tuple(commands_of(parser))}
    return [_command(" ".join(path), each, words) for path, each in walk(parser)]


def _command(
    path: str, parser: argparse.ArgumentParser, known: Mapping[str, tuple[str, ...]]
) -> Command:
    below = subcommands(parser)
    arguments = [_argument(action, known) for action in parser._actions if action is not below]
    options = [each for each in arguments if each.names]
    return Command(path, options, [a for a in arguments if not a.names], commands_of(parser))


def _argument(action: argparse.Action, known: Mapping[str, tuple[str, ...]]) -> Argument:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest).upper()
    words = tuple(map(str, action.choices)) if action.choices else known.get(value, ())
    text = str(action.help or "").replace("%(default)s", str(action.default))
    return Argument(tuple(action.option_strings), value, words, text, action.nargs in ("*", "+"))


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell: bash, zsh or fish."""
    made: Mapping[str, Callable[[list[Command]], Iterable[str]]] = {
        "bash": _bash,
        "zsh": _zsh,
        "fish": _fish,
    }
    head = f"# {shell}'s completion of vchan, made by: vchan completion {shell}"
    lines = list(made[shell](commands(parser)))
    first = ["#compdef vchan"] if shell == "zsh" else []
    return "\n".join([*first, head, *lines]) + "\n"


def _quoted(text: str) -> str:
    """For a POSIX shell."""
    return "'" + text.replace("'", "'\\''") + "'"


# ---------------------------------------------------------------- bash

_BASH_END: Final = f"""\
_vchan_vms()
{{
    local asked=() path=${{socket//[\\\\\\"\\']/}}
    [[ $path != \\~/* ]] || path=$HOME/${{path:2}}
    [[ ! $path ]] || asked=({DAEMON} "$path")
    # compgen expands its words, and bash quotes none that it inserts.
    "${{words[0]}}" "${{asked[@]}}" {VMS} 2>/dev/null | grep -x '[[:alnum:]_.:@+-]*'
}}

_vchan_complete()
{{
    local IFS=$'\\n'
    case $1 in
        VM) mapfile -t COMPREPLY < <(compgen -W "$(_vchan_vms)" -- "$cur") ;;
        {" | ".join(sorted(FILES))}) _filedir ;;
        DIR) _filedir -d ;;
        WORDS) mapfile -t COMPREPLY < <(compgen -W "${{2// /$IFS}}" -- "$cur") ;;
    esac
}}

_vchan()
{{
    local cur prev words cword i path='' count=0 options valued below operands value socket=''
    _init_completion -n = || return
    _vchan_facts ''
    for ((i = 1; i < cword; i++)); do
        if [[ ${{words[i]}} == -* ]]; then
            case ${{words[i]}} in
                {DAEMON}) socket=${{words[i + 1]}} ;;
                {DAEMON}=*) socket=${{words[i]#*=}} ;;
            esac
            [[ " $valued " != *" ${{words[i]}} "* ]] || ((i += 1))
        elif [[ " $below " == *" ${{words[i]}} "* ]]; then
            path="${{path:+$path }}${{words[i]}}"
            _vchan_facts "$path"
        else
            ((count += 1))
        fi
    done
    if ((i > cword)); then
        _vchan_value "$path" "$prev"
        return
    fi
    if [[ $cur == -* ]]; then
        _vchan_complete WORDS "$options"
    elif [[ $below ]]; then
        _vchan_complete WORDS "$below"
    else
        _vchan_operand "$path" "$count"
    fi
}} && complete -F _vchan vchan"""


def _bash(every: list[Command]) -> Iterator[str]:
    yield "_vchan_facts()\n{\n    case $1 in"
    for command in every:
        names = [name for each in command.options for name in each.names]
        valued = [name for each in command.options if each.value for name in each.names]
        yield f"        {_quoted(command.path)})"
        yield f"            options={_quoted(' '.join(names))}"
        yield f"            valued={_quoted(' '.join(valued))}"
        yield f"            below={_quoted(' '.join(command.below))} ;;"
    yield "    esac\n}\n\n_vchan_value()\n{\n    case $1:$2 in"
    for command in every:
        for each in command.options:
            wanted = _bash_kind(each)
            for name in each.names if wanted else ():
                yield f"        {_quoted(f'{command.path}:{name}')}) _vchan_complete {wanted} ;;"
    yield "    esac\n}\n\n_vchan_operand()\n{\n    case $1:$2 in"
    for command in every:
        for number, each in enumerate(command.operands):
            wanted = _bash_kind(each)
            if wanted:
                where = _quoted(f"{command.path}:{number}")
                yield f"        {where}) _vchan_complete {wanted} ;;"
    yield "    esac\n}\n"
    yield _BASH_END


def _bash_kind(argument: Argument) -> str:
    """The words of `_vchan_complete` for it; "" where nothing can be proposed."""
    if argument.words:
        return f"WORDS {_quoted(' '.join(argument.words))}"
    known = argument.value in FILES or argument.value in ("VM", "DIR")
    return argument.value if known else ""


# ---------------------------------------------------------------- zsh

_ZSH_DAEMON: Final = (
    "    local socket=''",
    "    local -a before",
    "    before=($words[2,CURRENT-1])",
    f"    local -i at=${{before[(I){DAEMON}(|=*)]}}",
    "    if (( at )); then",
    "        socket=${before[at]#*=}",
    f"        [[ $before[at] != {DAEMON} ]] || socket=$before[at+1]",
    "        socket=${${(Q)socket}/#\\~\\//$HOME/}",
    "    fi",
)
"""The whole command, where no command below has taken its words from it yet."""


def _zsh(every: list[Command]) -> Iterator[str]:
    yield f"""\
_vchan_vms()
{{
    local -a asked vms
    [[ -z $socket ]] || asked=({DAEMON} ${{(q)socket}})  # _call_program has it read once more
    vms=(${{(f)"$(_call_program vms vchan $asked {VMS} 2>/dev/null)"}})
    compadd -a vms
}}
"""
    for command in reversed(every):
        yield f"{_zsh_name(command.path)}()\n{{"
        yield "    local curcontext=$curcontext state line"
        yield "    typeset -A opt_args"
        yield from () if command.path else _ZSH_DAEMON
        yield "    _arguments -C -s -S \\"
        yield from (f"        {spec} \\" for each in command.options for spec in _zsh_option(each))
        if command.below:
            # (-): the options behind a command are that command's.
            yield "        '(-): :->command' '(-)*:: :->rest'"
            yield from _zsh_below(command)
        else:
            yield from (f"        {_zsh_operand(each)} \\" for each in command.operands)
            yield "        && return 0"
        yield "}\n"
    yield '[[ $funcstack[1] != _vchan ]] || _vchan "$@"'
    yield "(( ! $+functions[compdef] )) || compdef _vchan vchan"


def _zsh_below(command: Command) -> Iterator[str]:
    yield "    local -a commands\n    case $state in\n        command)\n            commands=("
    for name, text in command.below.items():
        yield f"                {_quoted(f'{name}:{text}')}"
    yield "            )\n            _describe -t commands command commands ;;"
    yield "        rest)\n            case $words[1] in"
    for name in command.below:
        path = f"{command.path} {name}".strip()
        yield f"                {name}) {_zsh_name(path)} ;;"
    yield "            esac ;;\n    esac"


def _zsh_name(path: str) -> str:
    return "_vchan" + "".join(f"_{word}" for word in path.split())


def _zsh_option(option: Argument) -> Iterator[str]:
    text = option.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]")
    repeats = "*" if option.names == ("-c", "--column") else ""
    for name in option.names:
        after = f":{option.value}:{_zsh_kind(option)}" if option.value else ""
        joined = "=" if name.startswith("--") else "+"  # the value may be in the option's word
        yield _quoted(f"{repeats}{name}{joined if after else ''}[{text}]{after}")


def _zsh_operand(operand: Argument) -> str:
    # What it is for says the metavar: the help may hold what zsh takes for more.
    return _quoted(f"{'*' if operand.repeats else ''}:{operand.value}:{_zsh_kind(operand)}")


def _zsh_kind(argument: Argument) -> str:
    if argument.words:
        return f"({' '.join(argument.words)})"
    kinds = {"VM": "_vchan_vms", "DIR": "_files -/", **dict.fromkeys(FILES, "_files")}
    return kinds.get(argument.value, " ")


# ---------------------------------------------------------------- fish


def _fish(every: list[Command]) -> Iterator[str]:
    yield f"""\
function __vchan_vms
    set -l asked
    set -l is_next 0
    for word in (commandline -opc)[2..]
        if test $is_next = 1
            set asked {DAEMON} $word
            set is_next 0
        else if test "$word" = {DAEMON}
            set is_next 1
        else if string match -q -- '{DAEMON}=*' $word
            set asked {DAEMON} (string replace -- {DAEMON}= '' $word)
        end
    end
    test -z "$asked"; or set asked[2] (string replace -r '^~/' "$HOME/" -- $asked[2])
    vchan $asked {VMS} 2>/dev/null
end

# Succeeds where the words so far lead to this command; with a number, after so many operands.
function __vchan_at
    set -l path
    set -l count 0
    set -l skips 0
    for word in (commandline -opc)[2..]
        if test $skips = 1
            set skips 0
        else if string match -q -- '-*' $word
            contains -- $word (__vchan_valued "$path"); and set skips 1
        else if contains -- $word (__vchan_below "$path")
            set path (string trim "$path $word")
        else
            set count (math $count + 1)
        end
    end
    test "$path" = "$argv[1]"; and begin
        test (builtin count $argv) = 1; or test $count = $argv[2]
    end
end

function __vchan_below
    switch "$argv[1]\""""
    for command in every:
        if command.below:
            yield f"        case {_fish_quoted(command.path)}"
            yield f"            string split ' ' {_fish_quoted(' '.join(command.below))}"
    yield '    end\nend\n\nfunction __vchan_valued\n    switch "$argv[1]"'
    for command in every:
        valued = [name for each in command.options if each.value for name in each.names]
        yield f"        case {_fish_quoted(command.path)}"
        yield f"            string split ' ' -- {_fish_quoted(' '.join(valued))}"
    yield "    end\nend\n\ncomplete -c vchan -f"
    for command in every:
        at = f'__vchan_at "{command.path}"'
        for name, text in command.below.items():
            given = f"-n {_fish_quoted(at)} -a {name} -d {_fish_quoted(text)}"
            yield f"complete -c vchan {given}"
        for each in command.options:
            yield f"complete -c vchan -n {_fish_quoted(at)} {_fish_option(each)}"
        for number, each in enumerate(command.operands):
            proposed = _fish_kind(each)
            if proposed:
                where = _fish_quoted(f"{at} {number}")
                yield f"complete -c vchan -n {where} {proposed}"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish_option(option: Argument) -> str:
    names = (f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names)
    takes = "-r" if option.value in FILES else "-x"
    value = f" {takes} {_fish_kind(option)}".rstrip() if option.value else ""
    return f"{' '.join(names)}{value} -d {_fish_quoted(option.help)}"


def _fish_kind(argument: Argument) -> str:
    if argument.words:
        return f"-a {_fish_quoted(' '.join(argument.words))}"
    kinds = {
        "VM": "-a '(__vchan_vms)'",
        "DIR": "-a '(__fish_complete_directories)'",
        **dict.fromkeys(FILES, "-F"),
    }
    return kinds.get(argument.value, "")
