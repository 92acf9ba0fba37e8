package main

import (
	"os"
	"regexp"
	"strings"
)

// An environment is what scripts need to work with a sandbox.
type environment struct {
	url, internalURL               string
	token, viewerToken, adminToken string
	apiBase, pat                   string
	databaseURL                    string
}

// write writes the environment as lines that a shell can source, in one piece:
// scripts wait for the file. It holds secrets.
func (e environment) write(path string) error {
	var text strings.Builder
	// The command line needs Tenantry's names exported. The others would make the
	// next sandbox of that shell use this one's Clarifai and database.
	export := "export"
	for _, v := range []struct{ name, value string }{
		{"TENANTRY_URL", e.url}, {"TENANTRY_INTERNAL_URL", e.internalURL},
		{"TENANTRY_TOKEN", e.token}, {"TENANTRY_VIEWER_TOKEN", e.viewerToken}, {"TENANTRY_ADMIN_TOKEN", e.adminToken},
		{"CLARIFAI_API_BASE", e.apiBase}, {"CLARIFAI_PAT", e.pat}, {"DATABASE_URL", e.databaseURL},
	} {
		text.WriteString(v.name + "=" + quoted(v.value) + "\n")
		if strings.HasPrefix(v.name, "TENANTRY_") {
			export += " " + v.name
		}
	}
	text.WriteString(export + "\n")
	if err := os.WriteFile(path+".new", []byte(text.String()), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

var plain = regexp.MustCompile(`^[A-Za-z0-9_./:@=?,+%-]*$`)

// quoted makes a value one word of a shell.
func quoted(s string) string {
	if plain.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
