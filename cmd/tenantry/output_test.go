package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestTable(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	w := newTable(&b, "A", "B")
	w.row("x\ty\n\x1b[2J\u202e", "")
	w.row("Zoë 東京", 7)
	if err := w.flush(); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%-21sB\n%-21s-\n%-21s7\n", "A", `x\ty\n\x1b[2J\u202e`, "Zoë 東京")
	if b.String() != want {
		t.Errorf("the table is\n%s\nwant\n%s", b.String(), want)
	}
}

func TestAgo(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	for d, want := range map[time.Duration]string{0: "0s ago", -time.Millisecond: "0s ago", 59 * time.Second: "59s ago", 61 * time.Second: "1m ago", 47 * time.Hour: "47h ago",
		49 * time.Hour: "2d ago", -90 * time.Minute: "in 1h", -400 * 24 * time.Hour: "in 400d"} {
		at := now.Add(-d)
		if got := ago(&at, now); got != want {
			t.Errorf("ago(%s before) = %q; want %q", d, got, want)
		}
	}
	if got := ago(nil, now) + exactly(&time.Time{}, now); got != "" {
		t.Errorf("no time shows as %q", got)
	}
}

func TestProgress(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	shows := func(p *progress, done, total int, text string) string {
		b.Reset()
		p.show(done, total, text)
		return b.String()
	}
	p := &progress{w: &b, width: 60}
	for _, c := range []struct {
		done, total int
		text, want  string
	}{
		{0, 0, "apps: 3 seen", "apps: 3 seen"},
		{1, 2, "x", "[" + strings.Repeat("=", 15) + strings.Repeat(" ", 15) + "] 1/2  x"},
		{9, 2, "x", "[" + strings.Repeat("=", 30) + "] 2/2  x"},
		{-1, 2, "x\n", "[" + strings.Repeat(" ", 30) + "] 0/2  x\\n"},
		{0, 0, strings.Repeat("é", 100), strings.Repeat("é", 59)},
	} {
		if got, want := shows(p, c.done, c.total, c.text), "\r\x1b[K"+c.want; got != want {
			t.Errorf("show(%d, %d, %q) prints %q; want %q", c.done, c.total, c.text, got, want)
		}
	}
	if got := shows(env{stderr: &b}.progress(), 1, 2, "x"); got != "" {
		t.Errorf("it prints %q where there is no terminal", got)
	}
}

// A change is followed through a restart of the service, and up to what another has
// made of it.
func TestFollow(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		command string
		answers string // to the looks, by blanks: a state, or a status
		exit    int
		says    string
	}{
		{"suspend", "503 429 cut suspending suspended", 0, "suspended"},
		{"suspend", "suspending active", 5, "changed by another command"},
		{"suspend", "404", 4, "404"},
		{"resume", "resuming suspended", 5, "changed by another command"},
		{"delete", "deleting deleted", 0, "deleted"},
		{"delete", "deleting revoked", 0, "keys_revoked"},
		{"delete --purge --yes", "deleting purging active", 5, "changed by another command"},
		{"suspend --no-wait", "", 0, "suspending"},
	} {
		answers := strings.Fields(c.answers)
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			state, status := "suspending", http.StatusAccepted
			if r.Method == http.MethodGet {
				if len(answers) == 0 {
					t.Errorf("%s: it looks again: %s", c.command, r.URL)
					answers = []string{"404"}
				}
				state, status = answers[0], http.StatusOK
				answers = answers[1:]
			}
			switch state {
			case "cut":
				panic(http.ErrAbortHandler)
			case "404", "429", "503":
				_, _ = fmt.Sscan(state, &status)
				w.WriteHeader(status)
				return
			}
			deletion := ""
			if state == "revoked" {
				state, deletion = "deleting", `,"deletion":{"keys_revoked":true,"purge_after":"2999-01-01T00:00:00Z"}`
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			_, _ = fmt.Fprintf(w, `{"id":"user_1","state":%q,"new_field":1%s}`, state, deletion)
		}))
		o := operatorAt{t: t, url: s.URL, vars: map[string]string{"TENANTRY_TOKEN": "tnty_x"}}
		command, flags, _ := strings.Cut(c.command, " ")
		out, _ := o.exits(c.exit, words("tenant "+command+" user_1 -o json "+flags), c.says)
		if !strings.Contains(out, `"new_field": 1`) {
			t.Errorf("%s does not print what the API answered last:\n%s", c.command, out)
		}
		s.Close()
	}
}
