package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/types"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/shoalnet/shoal/runtime/container"
)

// dockerHub is the key of Docker Hub in config.json.
const dockerHub = "https://index.docker.io/v1/"

func configKey(host string) string {
	switch host {
	case "", "docker.io", "index.docker.io", "registry-1.docker.io":
		return dockerHub
	}
	return host
}

// registryAuth is this user's login for an image's registry, from Docker's
// config.json and credential helpers; empty: none.
func registryAuth(image string) (string, error) {
	ref, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return "", nil // said by who validates it
	}
	cfg, err := config.Load(config.Dir())
	if err != nil {
		return "", fmt.Errorf("logins of registries: %w", err)
	}
	host := reference.Domain(ref)
	a, err := cfg.GetAuthConfig(configKey(host))
	if err != nil {
		return "", fmt.Errorf("login of registry %s: %w", host, err)
	}
	if a.Username == "" && a.IdentityToken == "" {
		return "", nil
	}
	return container.EncodeAuth(container.Auth{Username: a.Username, Password: a.Password, IdentityToken: a.IdentityToken, ServerAddress: host}), nil
}

func (c *cli) loginCmd() *cobra.Command {
	var user, password string
	var stdin bool
	cmd := &cobra.Command{Use: "login [flags] [REGISTRY]", Short: "Keep user and password of a registry", Args: cobra.MaximumNArgs(1),
		Long: `Login keeps user and password of a registry (Docker Hub if none is named) where
docker keeps them: $DOCKER_CONFIG/config.json, or ~/.docker/config.json, or the
credential helper that is named there. 'shoal run' and 'shoal image pull' use
them; 'shoal svc create' sends them to the nodes with --with-registry-auth.

They are tried when an image is fetched, not now: the nodes reach the registry,
this machine need not.`,
		Example: "  shoal login -u ana registry.example.com\n  echo $TOKEN | shoal login -u ci --password-stdin registry.example.com:5000",
		RunE: func(cmd *cobra.Command, args []string) error {
			host := ""
			if len(args) == 1 {
				host = strings.TrimSuffix(args[0], "/")
				if _, rest, ok := strings.Cut(host, "://"); ok {
					host = rest
				}
			}
			if stdin && password != "" {
				return usageError(cmd, errors.New("--password and --password-stdin exclude each other"))
			}
			in := bufio.NewReader(c.in)
			tty, isTerm := c.in.(*os.File)
			isTerm = isTerm && term.IsTerminal(int(tty.Fd()))
			if stdin {
				if user == "" {
					return usageError(cmd, errors.New("--password-stdin needs --username"))
				}
				b, err := io.ReadAll(io.LimitReader(in, 64<<10))
				if err != nil {
					return err
				}
				password = strings.TrimRight(string(b), "\r\n")
			}
			if user == "" {
				if !isTerm {
					return usageError(cmd, errors.New("no user: give --username, and --password-stdin"))
				}
				fmt.Fprint(c.err, "Username: ")
				l, err := in.ReadString('\n')
				if err != nil {
					return err
				}
				user = strings.TrimSpace(l)
			}
			if password == "" {
				if !isTerm {
					return usageError(cmd, errors.New("no password: give it on standard input with --password-stdin"))
				}
				fmt.Fprint(c.err, "Password: ")
				b, err := term.ReadPassword(int(tty.Fd()))
				fmt.Fprintln(c.err)
				if err != nil {
					return err
				}
				password = string(b)
			}
			if user == "" || password == "" {
				return errors.New("user and password can't be empty")
			}
			cfg, err := config.Load(config.Dir())
			if err != nil {
				return err
			}
			key := configKey(host)
			if err := cfg.GetCredentialsStore(key).Store(types.AuthConfig{Username: user, Password: password, ServerAddress: key}); err != nil {
				return fmt.Errorf("keep the login: %w", err)
			}
			fmt.Fprintln(c.out, "Login kept; it is tried when an image is fetched")
			return nil
		}}
	f := cmd.Flags()
	f.StringVarP(&user, "username", "u", "", "user")
	f.StringVarP(&password, "password", "p", "", "password (others on this machine may see it: better --password-stdin)")
	f.BoolVar(&stdin, "password-stdin", false, "read the password from standard input")
	return cmd
}

func (c *cli) logoutCmd() *cobra.Command {
	return &cobra.Command{Use: "logout [REGISTRY]", Short: "Forget user and password of a registry", Example: "  shoal logout registry.example.com", Args: cobra.MaximumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			host := ""
			if len(args) == 1 {
				host = args[0]
			}
			cfg, err := config.Load(config.Dir())
			if err != nil {
				return err
			}
			key := configKey(host)
			if a, err := cfg.GetAuthConfig(key); err == nil && a.Username == "" && a.IdentityToken == "" {
				fmt.Fprintf(c.out, "Not logged in to %s\n", key)
				return nil
			}
			if err := cfg.GetCredentialsStore(key).Erase(key); err != nil {
				return err
			}
			fmt.Fprintf(c.out, "Removed the login of %s\n", key)
			return nil
		}}
}
