package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestComplete(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		words string // the last one, behind the last blank, is being written
		want  string // among others, after a plus
	}{
		{"tenantr", "words"},
		{"ten", "words tenant"},
		{"tenant re", "words resume restore retry"},
		{"tenant suspend x --no-", "words --no-wait"},
		{"tenant update --no-", "words --no-deletion-protection"},
		{"tenant list --state a", "words active"},
		{"tenant list --state=a", "words --state=active"},
		{"tenant list --state = a", "words active"},
		{"tenant list --state =", "+provisioning"},
		{"tenant list --state ", "+provisioning"},
		{"tenant list -o ", "words table json"},
		{"tenant list --output json --state=active --pro", "words --profile --problem"},
		{"tenant list --no-problem --state s", "words suspending suspended"},
		{"tenant list --url a", "words"},
		{"tenant list --token-file ", "files"},
		{"tenant list --token-file=x", "files"},
		{"tenant delete -- --", "words"},
		{"completion ", "words bash zsh fish"},
		{"profile check ", "files"},
		{"tenant show user_1 ", "+--output"},
		{"tenant show show ", "+--output"},
		{"tenant list --nothing=", "words"},
		{"reconcile --js", "words"}, // hidden
		{"", "+tenant"},
	} {
		args := append([]string{completeWord}, strings.Split(c.words, " ")...)
		exit, out, stderr := command(t, nil, args...)
		var got []string
		for line := range strings.Lines(out) {
			word, _, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
			got = append(got, word)
		}
		want, some := strings.CutPrefix(c.want, "+")
		if exit != 0 || stderr != "" || some && !slices.Contains(got, want) || !some && strings.Join(got, " ") != want {
			t.Errorf("%q is completed with %q, exit %d %s; want %q", c.words, got, exit, stderr, c.want)
		}
	}
	if exit, _, _ := command(t, nil, completeWord); exit != 0 {
		t.Errorf("with nothing to complete it exits with %d", exit)
	}
	if exit, _, _ := command(t, nil, "completion", "cmd"); exit != 2 {
		t.Errorf("another shell exits with %d", exit)
	}
}

// asCommand makes the test binary be tenantry.
const asCommand = "TENANTRY_TEST_AS_COMMAND"

// The scripts, in their shells.
func TestCompletionScripts(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "tenantry"), fmt.Appendf(nil, "#!/bin/sh\n%s=1 exec '%s' \"$@\"\n", asCommand, self), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "a token"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	in := func(shell, program string) string {
		t.Helper()
		script := must(t, nil, "completion", shell)
		file := filepath.Join(dir, "completion."+shell)
		if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.CommandContext(t.Context(), shell, "-n", file).CombinedOutput(); err != nil {
			t.Errorf("%s cannot read its script: %v\n%s", shell, err, out)
		}
		flags := map[string][]string{"bash": {"--norc", "--noprofile"}, "zsh": {"-f"}, "fish": {"--no-config"}}[shell]
		cmd := exec.CommandContext(t.Context(), shell, append(flags, "-c", program, "sh", file)...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "HOME="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	missing := func(shell string) bool {
		_, err := exec.LookPath(shell)
		if err != nil {
			t.Logf("there is no %s here: its script was not tried", shell)
		}
		return err != nil
	}
	if !missing("bash") {
		for words, want := range map[string]string{"tenant re": "resume restore retry", "tenant list --state = a": "active", "tenant list --output = ": "table json",
			"tenant list --output =": "table json", "tenant list --token-file a": "a token", "completion z": "zsh"} {
			n := len(strings.Split(words, " "))
			got := in("bash", fmt.Sprintf(`. "$1"; COMP_WORDS=(tenantry %s %s); COMP_CWORD=%d; _tenantry; echo "${COMPREPLY[*]}"; complete -p tenantry >/dev/null`,
				strings.TrimSuffix(words, " "), map[bool]string{true: "''"}[strings.HasSuffix(words, " ")], n))
			if got != want {
				t.Errorf("bash completes %q with %q; want %q", words, got, want)
			}
		}
	}
	if !missing("fish") {
		for words, want := range map[string]string{"tenant re": "restore\tresume\tretry", "tenant list --state=a": "--state=active", "tenant list --token-file=a": "--token-file=a token",
			"tenant list --token-file a": "a token"} {
			var got []string
			for line := range strings.Lines(in("fish", `source $argv[2]; complete -C "tenantry `+words+`"`)) {
				word, _, _ := strings.Cut(strings.TrimSpace(line), "\t")
				got = append(got, word)
			}
			slices.Sort(got)
			if strings.Join(got, "\t") != want {
				t.Errorf("fish completes %q with %q; want %q", words, got, want)
			}
		}
	}
	if !missing("zsh") {
		// What zsh would offer, with its own functions for that put aside.
		got := in("zsh", `compdef() { registered=$2; }; _describe() { print -l -- "${(P@)4}"; }; . "$1"; [ "$registered" = tenantry ] || echo not registered
			words=(tenantry tenant list --state s); CURRENT=5; _tenantry`)
		if got != "suspending:\nsuspended:" {
			t.Errorf("zsh completes with %q", got)
		}
	}
}
