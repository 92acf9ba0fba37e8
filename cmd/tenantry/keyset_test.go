package main

import (
	"crypto/rand"
	"encoding/base64"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func localKMS(t *testing.T) string {
	t.Helper()
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	return localKey + "://" + base64.URLEncoding.EncodeToString(key)
}

// keyIn returns the id of the key that a line of status shows with a state.
func keyIn(t *testing.T, status, state string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^(\d+) +` + state + ` `).FindStringSubmatch(status)
	if m == nil {
		t.Fatalf("status shows no %s key:\n%s", state, status)
	}
	return m[1]
}

// The keyset is wrapped by a KMS, rotated beside a running service and loses its old
// key, as an operator does it.
func TestRekey(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	url := pgtest.URL(t).Reveal()
	vars, serve, addrFile := settings(t, url, w.Clarifai)
	keyset := serve[2]
	file := []string{"--keyset-file", keyset}
	keysetCommand := func(args ...string) []string { return append(append([]string{"keyset"}, args...), file...) }
	fails(t, vars, keysetCommand("wrap"), "TENANTRY_KEYSET_KMS")

	vars["TENANTRY_KEYSET_KMS"] = localKMS(t)
	fails(t, vars, serve, "tenantry keyset wrap")
	must(t, vars, keysetCommand("wrap")...)
	fails(t, vars, keysetCommand("wrap"), "wrapped")
	without := maps.Clone(vars)
	delete(without, "TENANTRY_KEYSET_KMS")
	fails(t, without, serve, "TENANTRY_KEYSET_KMS")
	fails(t, without, keysetCommand("rotate"), "TENANTRY_KEYSET_KMS")
	first := keyIn(t, must(t, vars, keysetCommand("status")...), "primary")
	fails(t, vars, keysetCommand("remove", "--key-id", first), "is the primary")

	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	signUp := func(id string) {
		t.Helper()
		if status, body := p.request(http.MethodPut, p.url+"/v1/tenants/"+id, token); status != http.StatusCreated {
			t.Errorf("sign-up answers %d %s", status, body)
		}
	}
	reveal := func(id string) {
		t.Helper()
		if status, body := p.request(http.MethodGet, p.url+"/v1/tenants/"+id+"/keys/default/secret", token); status != http.StatusOK {
			t.Errorf("the secret is answered %d %s", status, body)
		}
	}
	metric := func(line string) {
		t.Helper()
		provisiontest.Eventually(t, "the metrics have "+line, func() bool {
			_, metrics := p.get(p.internal + "/metrics")
			return strings.Contains(metrics, line+"\n")
		})
	}
	signUp("user_1")
	provisiontest.Eventually(t, "the marker is sealed", func() bool {
		return regexp.MustCompile(`(?m)^` + first + ` +primary +1 +1 +0 +yes`).MatchString(must(t, vars, keysetCommand("status")...))
	})

	must(t, vars, keysetCommand("rotate", "--prepare")...)
	next := keyIn(t, must(t, vars, keysetCommand("status")...), "prepared")
	metric(`tenantry_keyset_key{key_id="` + next + `",primary="false"} 1`)
	must(t, vars, keysetCommand("rotate")...)
	metric(`tenantry_keyset_key{key_id="` + next + `",primary="true"} 1`)
	signUp("user_2")
	provisiontest.Eventually(t, "the new key has sealed all", func() bool {
		status := must(t, vars, keysetCommand("status")...)
		return regexp.MustCompile(`(?m)^`+first+` +old +0 +0 +0 +-`).MatchString(status) &&
			regexp.MustCompile(`(?m)^`+next+` +primary +2 +2 +0 +yes`).MatchString(status)
	})
	metric("tenantry_reseal_remaining 0")
	metric("tenantry_keyset_missing_keys 0")

	conn := pgtest.Conn(t, tenant.NewSecret(url))
	if _, err := conn.Exec(t.Context(), `UPDATE apps SET marker_key_id = $1 WHERE tenant_id = 'user_1'`, first); err != nil {
		t.Fatal(err)
	}
	_, other, _ := settings(t, url, w.Clarifai)
	unwrapped := maps.Clone(without)
	must(t, unwrapped, "keyset", "rotate", "--keyset-file", other[2])
	if exit, _, stderr := command(t, unwrapped, "keyset", "remove", "--keyset-file", other[2], "--key-id",
		keyIn(t, must(t, unwrapped, "keyset", "status", "--keyset-file", other[2]), "old")); exit != 1 || !strings.Contains(stderr, "another keyset") {
		t.Errorf("a key is removed though the database is another deployment's: %d, %s", exit, stderr)
	}
	provisiontest.Eventually(t, "the old key can be removed", func() bool {
		exit, _, stderr := command(t, vars, keysetCommand("remove", "--key-id", first)...)
		if exit != 0 && !strings.Contains(stderr, "the key "+first+" is needed, by the markers of 1 apps") {
			t.Fatalf("remove exits with %d: %s", exit, stderr)
		}
		return exit == 0
	})
	fails(t, vars, keysetCommand("remove", "--key-id", first), "there is no key "+first)
	provisiontest.Eventually(t, "the service has forgotten the old key", func() bool {
		_, metrics := p.get(p.internal + "/metrics")
		return !strings.Contains(metrics, `key_id="`+first+`"`)
	})
	reveal("user_1")
	reveal("user_2")
	if info, err := os.Stat(keyset); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the keyset's mode is %v, %v", info.Mode(), err)
	}
	p.stop()
	if exit := <-p.exit; exit != 0 {
		t.Errorf("serve exits with %d: %s", exit, p.stderr.String())
	}
	if _, secret, _ := strings.Cut(vars["TENANTRY_KEYSET_KMS"], "://"); strings.Contains(p.stderr.String(), secret) {
		t.Error("the key that wraps the keyset is in the log")
	}
}

// No fault of the KMS's setting shows the setting, which may be a key.
func TestKMSSetting(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	keyset := filepath.Join(dir, "keyset.json")
	create := []string{"keyset", "create", "--keyset-file", keyset}
	for url, says := range map[string]string{
		"hunter2": "begins with one of awskms://", "base64keys://hunter2": "begins with one of", "base64key://": "32 bytes in base64",
		"base64key://hunter2": "32 bytes in base64", "base64key://hunter2?x=hunter2": "32 bytes in base64", "://hunter2": "begins with one of",
		"hashivault://hunter2": "open keeper [url]: ",
	} {
		fails(t, map[string]string{"TENANTRY_KEYSET_KMS": url}, create, "TENANTRY_KEYSET_KMS: ", says)
	}
	fails(t, map[string]string{"TENANTRY_KEYSET_KMS": localKMS(t)}, append(create, "--keyset-kms-file", empty), "both TENANTRY_KEYSET_KMS and TENANTRY_KEYSET_KMS_FILE")
	fails(t, nil, append(create, "--keyset-kms-file", empty), "TENANTRY_KEYSET_KMS_FILE", "is empty")
	if _, err := os.Stat(keyset); !os.IsNotExist(err) {
		t.Errorf("a keyset was made all the same: %v", err)
	}

	in := filepath.Join(dir, "kms")
	if err := os.WriteFile(in, []byte(localKMS(t)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	must(t, nil, append(create, "--keyset-kms-file", in)...)
	must(t, nil, "keyset", "rotate", "--keyset-file", keyset, "--keyset-kms-file", in)
	fails(t, map[string]string{"TENANTRY_KEYSET_KMS": localKMS(t)}, []string{"keyset", "rotate", "--keyset-file", keyset}, "not the one that wrapped the keyset")
}
