package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"

	"github.com/tenantry/tenantry/internal/tenant"
)

// isTerminal reports whether a person sits behind a stream.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// A progress is one line of a terminal that says how far something is. Where stderr
// is no terminal it prints nothing.
type progress struct {
	w     io.Writer // nil where nothing is printed
	width int
}

func (e env) progress() *progress {
	p := &progress{width: 80}
	if !e.onTerminal(e.stderr) {
		return p
	}
	p.w = e.stderr
	if f, ok := e.stderr.(*os.File); ok {
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
			p.width = width
		}
	}
	return p
}

func (p *progress) visible() bool { return p.w != nil }

// barWidth is that of the bar alone, without what is said beside it.
const barWidth = 30

// show says how far it is: with a bar if total, which may be unknown, is not 0.
func (p *progress) show(done, total int, text string) {
	if p.w == nil {
		return
	}
	if total > 0 {
		done = min(max(done, 0), total)
		full := barWidth * done / total
		text = fmt.Sprintf("[%s%s] %d/%d  %s", strings.Repeat("=", full), strings.Repeat(" ", barWidth-full), done, total, text)
	}
	line := []rune(plain(text))
	// A line that reaches the edge would wrap, and could not be written over.
	line = line[:min(len(line), max(p.width-1, 0))]
	_, _ = fmt.Fprintf(p.w, "\r\x1b[K%s", string(line))
}

// end takes the line away.
func (p *progress) end() {
	if p.w != nil {
		_, _ = fmt.Fprint(p.w, "\r\x1b[K")
	}
}

// onTerminal reports whether a stream of the process is a terminal.
func (e env) onTerminal(stream any) bool { return e.terminal != nil && e.terminal(stream) }

// confirm asks a person to type word, and refuses unless that is done. It does not
// ask if yes is set, and cannot where there is nobody to ask.
func (e env) confirm(yes bool, question, word string) error {
	if yes {
		return nil
	}
	if !e.onTerminal(e.stdin) {
		return usagef("%s: say --yes if you mean it", question)
	}
	_, err := e.typed(question, word)
	return err
}

// typed asks for word to be typed, and returns what was typed. stdin need not be a terminal. No flag
// replaces the typing.
func (e env) typed(question, word string) (string, error) {
	if e.stdin == nil {
		return "", usagef("%s: %s must be typed on stdin, and there is no stdin", question, word)
	}
	_, _ = fmt.Fprintf(e.stderr, "%s.\nType %s to go on: ", plain(question), plain(word))
	line, err := readLine(e.stdin)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if line = strings.TrimSpace(line); line != word {
		return "", errors.New("not confirmed: nothing was changed")
	}
	return line, nil
}

// readSecret reads a line from stdin, which a terminal does not echo. A secret is not
// taken from the command line, which everybody on the machine can read.
func (e env) readSecret(what string) (tenant.Secret, error) {
	if e.stdin == nil {
		return tenant.Secret{}, usagef("%s is read from stdin, and there is none", what)
	}
	var line string
	var err error
	if f, ok := e.stdin.(*os.File); ok && e.onTerminal(f) {
		_, _ = fmt.Fprintf(e.stderr, "%s: ", what)
		var raw []byte
		raw, err = term.ReadPassword(int(f.Fd()))
		_, _ = fmt.Fprintln(e.stderr)
		line = string(raw)
	} else {
		line, err = readLine(e.stdin)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return tenant.Secret{}, fmt.Errorf("read %s from stdin: %w", what, err)
	}
	if line = strings.TrimSpace(line); line == "" {
		return tenant.Secret{}, usagef("%s is read from stdin, and its first line is empty", what)
	}
	return tenant.NewSecret(line), nil
}

// maxLine is longer than any line that is asked for.
const maxLine = 4096

// readLine reads a line and nothing behind it, which may be the answer to the next
// question.
func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); len(line) < maxLine; {
		n, err := r.Read(b)
		if n > 0 && b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[:n]...)
		if err != nil {
			return string(line), err
		}
	}
	return "", errors.New("the line is too long")
}
