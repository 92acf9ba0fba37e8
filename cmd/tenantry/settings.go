package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

// databaseFlags say where the database is.
type databaseFlags struct {
	DatabaseURLFile       string `name:"database-url-file" env:"DATABASE_URL_FILE" placeholder:"FILE" help:"File with the Postgres connection string. Without it: DATABASE_URL."`
	DatabaseDirectURLFile string `name:"database-direct-url-file" env:"DATABASE_DIRECT_URL_FILE" placeholder:"FILE" help:"File with a connection string that gives sessions, where the other leads through a pooler in transaction mode. Without it: DATABASE_DIRECT_URL, or else the other."`
}

// urls returns the two connection strings, direct being that of the database
// itself.
func (f databaseFlags) urls(e env) (url, direct tenant.Secret, err error) {
	url, err = secretSetting(e, "DATABASE_URL", f.DatabaseURLFile)
	if err != nil {
		return url, direct, err
	}
	if !url.IsSet() {
		return url, direct, errors.New("the database is not named: set DATABASE_URL or --database-url-file")
	}
	if err := postgres.ParseURL(url); err != nil {
		return url, direct, fmt.Errorf("%s: %w", variableOf("DATABASE_URL", f.DatabaseURLFile), err)
	}
	direct, err = secretSetting(e, "DATABASE_DIRECT_URL", f.DatabaseDirectURLFile)
	if err != nil {
		return url, direct, err
	}
	if !direct.IsSet() {
		return url, url, nil
	}
	if err := postgres.ParseURL(direct); err != nil {
		return url, direct, fmt.Errorf("%s: %w", variableOf("DATABASE_DIRECT_URL", f.DatabaseDirectURLFile), err)
	}
	return url, direct, nil
}

// secretSetting reads a secret from a file, or else from the environment. It is
// unset where neither is given. White space around it is no part of it.
func secretSetting(e env, variable, file string) (tenant.Secret, error) {
	if err := onlyOne(e, variable, file); err != nil {
		return tenant.Secret{}, err
	}
	text := e.get(variable)
	if file != "" {
		raw, err := os.ReadFile(file)
		if err != nil {
			return tenant.Secret{}, fmt.Errorf("%s_FILE: %w", variable, err)
		}
		if text = string(raw); strings.TrimSpace(text) == "" {
			return tenant.Secret{}, fmt.Errorf("%s_FILE: %s is empty", variable, file)
		}
	}
	if text = strings.TrimSpace(text); text == "" {
		return tenant.Secret{}, nil
	}
	return tenant.NewSecret(text), nil
}

// variableOf is the variable that gave a secret.
func variableOf(variable, file string) string {
	if file != "" {
		return variable + "_FILE"
	}
	return variable
}

// onlyOne refuses a secret that is given in two ways: which of them is the right
// one only the operator knows.
func onlyOne(e env, variable, file string) error {
	if file != "" && strings.TrimSpace(e.get(variable)) != "" {
		return fmt.Errorf("both %s and %s_FILE are given: give one", variable, variable)
	}
	return nil
}

// checkAddr reports what is wrong with an address to listen on.
func checkAddr(name, addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err != nil || port == "" {
		return fmt.Errorf("%s: %q must read host:port, such as 127.0.0.1:8080 or :8080", name, addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%s: the port of %q must be a number from 0 to 65535", name, addr)
	}
	return nil
}
