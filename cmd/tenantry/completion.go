package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"The shell: ${enum}."`
}

func (c completionCmd) Run(e env) error {
	_, err := io.WriteString(e.stdout, completionScripts[c.Shell])
	return err
}

func (completionCmd) Help() string {
	return `The script asks the tenantry on the PATH for what may follow, so it knows every command and flag of the version that is installed.

  bash  source <(tenantry completion bash)      # in ~/.bashrc
  zsh   source <(tenantry completion zsh)       # in ~/.zshrc, after compinit
  fish  tenantry completion fish | source       # in ~/.config/fish/config.fish`
}

// completeWord is how the scripts call: it is followed by the words behind tenantry,
// up to the one that is being written, which may be empty.
const completeWord = "__complete"

// completionScripts pass on what complete prints: a line that says files or words,
// and then a candidate on each line, with what it does behind a tab.
var completionScripts = map[string]string{
	"bash": `# Completion of tenantry for bash.
_tenantry() {
	local line kind='' cur="${COMP_WORDS[COMP_CWORD]}"
	[ "$cur" = "=" ] && cur=
	COMPREPLY=()
	while IFS= read -r line; do
		if [ -z "$kind" ]; then
			kind=$line
			continue
		fi
		line=${line%%$'\t'*}
		[[ $line == "$cur"* ]] && COMPREPLY+=("$line")
	done < <(tenantry __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
	if [ "$kind" = files ]; then
		local IFS=$'\n'
		COMPREPLY=($(compgen -f -- "$cur"))
		compopt -o filenames 2>/dev/null # bash 4 and newer
	fi
}
complete -F _tenantry tenantry
`,
	"zsh": `#compdef tenantry
# Completion of tenantry for zsh.
_tenantry() {
	local line kind='' word does
	local -a candidates
	while IFS= read -r line; do
		if [[ -z $kind ]]; then
			kind=$line
			continue
		fi
		word=${line%%$'\t'*}
		does=${line#*$'\t'}
		candidates+=("${word//:/\\:}:$does")
	done < <(tenantry __complete "${(@)words[2,CURRENT]}" 2>/dev/null)
	if [[ $kind == files ]]; then
		compset -P '*='
		_files
		return
	fi
	_describe -t commands tenantry candidates
}
if [ "$funcstack[1]" = _tenantry ]; then
	_tenantry "$@"
else
	compdef _tenantry tenantry
fi
`,
	"fish": `# Completion of tenantry for fish.
function __tenantry_complete
	set -l words (commandline -opc) (commandline -ct)
	set -l answer (tenantry __complete $words[2..-1] 2>/dev/null)
	if test "$answer[1]" = files
		set -l current (commandline -ct)
		set -l prefix (string match -r -- '^--[^=]*=' $current)
		for file in (__fish_complete_path (string replace -r -- '^--[^=]*=' '' $current))
			echo "$prefix$file"
		end
		return
	end
	if test (count $answer) -gt 1
		printf '%s\n' $answer[2..-1]
	end
end
complete -c tenantry -f -a '(__tenantry_complete)'
`,
}

// complete prints what may stand at the place of the last word.
func complete(w io.Writer, app *kong.Application, words []string) error {
	words = joined(words)
	current := ""
	if len(words) > 0 {
		current, words = words[len(words)-1], words[:len(words)-1]
	}
	at, positional, flag, only := follows(app.Node, words)
	var c candidates
	name, _, assigned := strings.Cut(current, "=")
	switch {
	case flag != nil:
		c.value(flag.Value, "")
	case !only && assigned && strings.HasPrefix(name, "--"):
		if f := findFlag(at, name); f != nil && !f.IsBool() {
			c.value(f.Value, name+"=")
		}
	case !only && strings.HasPrefix(current, "-"):
		c.flags(at)
	default:
		for _, child := range at.Children {
			if !child.Hidden {
				c.add(child.Name, child.Help)
			}
		}
		if positional < len(at.Positional) {
			c.value(at.Positional[positional], "")
		}
		if len(c.lines) == 0 && !c.files && !only {
			c.flags(at)
		}
	}
	kind := "words"
	if c.files {
		kind = "files"
	}
	_, err := fmt.Fprintln(w, strings.Join(append([]string{kind}, c.matching(current)...), "\n"))
	return err
}

// joined puts a flag and its value together again that bash takes apart at the sign
// between them. What is being written then is the value alone, as bash has it.
func joined(words []string) []string {
	if n := len(words); n >= 2 && words[n-1] == "=" && strings.HasPrefix(words[n-2], "--") {
		return append(slices.Clone(words[:n-2]), words[n-2], "") // --flag= and nothing yet
	}
	var out []string
	for i := 0; i < len(words); i++ {
		if words[i] == "=" && len(out) > 0 && strings.HasPrefix(out[len(out)-1], "--") {
			continue // --flag = value reads as --flag value
		}
		out = append(out, words[i])
	}
	return out
}

// follows goes along words from a command: to the command that they name, how many of
// its arguments they give, the flag whose value comes next, and whether only
// arguments may follow.
func follows(at *kong.Node, words []string) (_ *kong.Node, positional int, flag *kong.Flag, only bool) {
	for _, word := range words {
		switch {
		case flag != nil:
			flag = nil
		case !only && word == "--":
			only = true
		case !only && strings.HasPrefix(word, "-") && word != "-":
			if f := findFlag(at, word); f != nil && !f.IsBool() && !strings.Contains(word, "=") {
				flag = f
			}
		default:
			if i := slices.IndexFunc(at.Children, func(n *kong.Node) bool { return n.Name == word }); i >= 0 {
				at, positional = at.Children[i], 0
			} else {
				positional++
			}
		}
	}
	return at, positional, flag, only
}

// findFlag finds a flag of a command by what is written for it.
func findFlag(at *kong.Node, word string) *kong.Flag {
	word, _, _ = strings.Cut(word, "=")
	for _, group := range at.AllFlags(false) {
		for _, f := range group {
			if "--"+f.Name == word || f.Short != 0 && "-"+string(f.Short) == word {
				return f
			}
		}
	}
	return nil
}

type candidates struct {
	lines []string
	files bool
}

func (c *candidates) add(word, does string) {
	does, _, _ = strings.Cut(does, ". ")
	c.lines = append(c.lines, word+"\t"+strings.TrimSuffix(does, "."))
}

// value adds what a flag or an argument may be.
func (c *candidates) value(v *kong.Value, prefix string) {
	if v.Enum != "" {
		for _, text := range v.EnumSlice() {
			c.add(prefix+text, "")
		}
	}
	holder := v.Name
	if v.Flag != nil {
		holder = v.Flag.PlaceHolder
	}
	c.files = c.files || strings.EqualFold(holder, "file")
}

func (c *candidates) flags(at *kong.Node) {
	for _, group := range at.AllFlags(true) {
		for _, f := range group {
			c.add("--"+f.Name, f.Help)
			if f.Tag.Negatable != "" {
				c.add("--no-"+f.Name, f.Help)
			}
		}
	}
}

func (c *candidates) matching(current string) []string {
	return slices.DeleteFunc(c.lines, func(line string) bool { return !strings.HasPrefix(line, current) })
}
